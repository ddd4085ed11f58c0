"""What a run has done so far, in one file that a killed server goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from library.training.errors import UserError
from library.training.files import write_atomically

from .settings import Settings

STATE = "federation.safetensors"
HISTORY = "history.json"


@dataclass
class Round:
    """One round.

    Attributes:
        number: counted from 1; 0 is what the run began with.
        accuracy, loss: of the server's model on the test pictures.
        clients: of those that took part, by name: `pictures`, `loss`, `seconds`.
        left_out: of those that did not, by name, why.
        traffic: by name, bytes `sent` and `received`, as counted on the wire.
        product_error: how far the new B·A is from the mean of the clients' B·A, relative to this.
        seconds: of the whole round.
    """

    number: int
    accuracy: float = 0.0
    loss: float = 0.0
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)
    product_error: float | None = None
    seconds: float = 0.0


@dataclass
class Journal:
    """The rounds of a run and the adapter behind the last one.

    Attributes:
        folder: where it is kept.
        tensors: the adapter, by name.
    """

    folder: Path
    settings: Settings
    tensors: dict[str, np.ndarray]
    rounds: list[Round] = field(default_factory=list)

    @property
    def last(self) -> int:
        """The number of the last round."""
        return self.rounds[-1].number if self.rounds else 0

    def save(self) -> None:
        """Write adapter and rounds in one file: killed at any moment, either the old or the new is
        there. The history is for reading, and written behind it.

        Raises:
            ValueError: a tensor, or what is told of a round, is not finite; nothing is written.
        """
        for name, array in self.tensors.items():
            if not np.isfinite(array).all():
                raise ValueError(f"'{name}' holds NaN or infinity, and is not saved")
        told = {
            "settings": self.settings.as_dict(),
            "rounds": [asdict(one) for one in self.rounds],
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in self.tensors.items()}
        metadata = {"federation": json.dumps(told, allow_nan=False)}
        text = json.dumps(told, indent=2, allow_nan=False)
        write_atomically(self.folder / STATE, lambda to: save_file(arrays, to, metadata))
        write_atomically(self.folder / HISTORY, lambda to: _write_text(to, text))

    @classmethod
    def of_folder(
        cls, folder: Path, settings: Settings, tensors: Mapping[str, np.ndarray]
    ) -> Journal:
        """The journal that a folder holds, or one that begins with `tensors`.

        Raises:
            UserError: it is of another run; names what differs.
        """
        file = folder / STATE
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is no folder.")
        if not file.exists():
            return cls(folder, settings, dict(tensors))
        try:
            with safe_open(file, "numpy") as held:
                told: dict[str, Any] = json.loads(held.metadata()["federation"])
                kept = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} is not what a run has written ({error}). Name another --output, or "
                "remove that folder."
            ) from error
        problems = settings.unlike(told["settings"])
        shapes = {name: array.shape for name, array in tensors.items()}
        if {name: array.shape for name, array in kept.items()} != shapes:
            problems.append("its adapter has other tensors")
        if problems:
            raise UserError(
                f"{folder} holds another run: {'; '.join(problems)}. Name another --output, or "
                "remove that folder."
            )
        ordered = {name: kept[name] for name in tensors}
        return cls(folder, settings, ordered, [Round(**one) for one in told["rounds"]])


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
