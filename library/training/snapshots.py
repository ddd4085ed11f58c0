"""What the optimizer has found, now and then in a run, in a file beside the adapter.

`NAME-optimizer.jsonl` has one snapshot a line; what is the same in all, as the parameters' names
and shapes, only the first one tells. Lines are appended one by one: a kill leaves at most a last
one that is cut off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.optim.telemetry import optimizer_snapshot
from library.training.errors import UserError
from library.training.files import write_atomically

Snapshot = dict[str, Any]
"""What `telemetry.optimizer_snapshot` returns, as far as a line of the file has it."""

SNAPSHOTS = 40  # in a run, more or less

_OF_ALL = ("names", "shapes", "lr_mask_edges")  # the same at every step: only in the first line


class Snapshots:
    """Writes the snapshots of a run's optimizer; no file for optimizers that have none.

    Args:
        path: the file. What another run has left there is replaced by the first snapshot.
        total_steps: the run's last step.
        resumed_at: the step after which the run goes on: up to there what is in the file is kept.
            None for a new run.

    Raises:
        UserError: the file of the run that is resumed is damaged.
    """

    def __init__(self, path: Path, total_steps: int, resumed_at: int | None = None) -> None:
        self.path = path
        self.total_steps = total_steps
        self._kept: list[Snapshot] = []
        if resumed_at is not None and path.is_file():
            self._kept = [line for line in read_snapshots(path) if line["step"] <= resumed_at]
        self._parameters: Snapshot | None = None

    def due(self, step: int) -> bool:
        """Whether `step`, counted from 1, is one of those evenly spread over the run; the last one
        is."""
        before, now = (SNAPSHOTS * number // self.total_steps for number in (step - 1, step))
        return now > before

    def take(self, optimizer: Any, step: int) -> None:
        """Write what `optimizer` has found after `step`."""
        snapshot = optimizer_snapshot(optimizer)
        if snapshot is None:
            return
        snapshot["step"] = step  # the run's; the optimizer may have skipped some
        parameters = {name: snapshot.pop(name) for name in _OF_ALL}
        if self._parameters == parameters:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(snapshot))
            return
        self._parameters = parameters
        earlier = self._kept if _describes(self._kept, parameters) else []
        first, *others = [*earlier, snapshot]
        text = "".join(map(_line, [first | parameters, *others]))
        write_atomically(self.path, lambda path: _write(path, text))

    def written(self) -> list[Snapshot]:
        """The snapshots of this run, of its parts before a resume too."""
        return read_snapshots(self.path) if self._parameters is not None else []


def read_snapshots(path: Path) -> list[Snapshot]:
    """The snapshots in a file, oldest first; only the first has `names`, `shapes` and
    `lr_mask_edges`. A last line that was cut off is left out.

    Raises:
        UserError: another line is no snapshot.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    snapshots: list[Snapshot] = []
    for number, line in enumerate(lines[:-1], 1):  # behind the last line's end is nothing
        try:
            snapshot = json.loads(line)
            complete = {"step", *(() if snapshots else _OF_ALL)} <= snapshot.keys()
        except (ValueError, AttributeError):
            complete = False
        if not complete:
            raise UserError(
                f"{path}, line {number}: this is no snapshot of an optimizer as a run writes it. "
                "Remove the file; a run needs nothing that is in it."
            )
        snapshots.append(snapshot)
    return snapshots


def _describes(snapshots: Sequence[Snapshot], parameters: Mapping[str, Any]) -> bool:
    return bool(snapshots) and {key: snapshots[0][key] for key in _OF_ALL} == parameters


def _line(snapshot: Mapping[str, Any]) -> str:
    return json.dumps(snapshot, separators=(",", ":")) + "\n"  # ASCII: any part can be read


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
