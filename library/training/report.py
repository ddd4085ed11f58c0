"""What a run tells while it goes: progress bar, trackers, and the history for the report."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from library.training.options import Options
from library.training.prompts import Prompt
from library.training.sampling import Sample
from library.training.trackers import Trackers, check_logging, tracker_names

__all__ = ["Report", "Series", "check_logging", "peak_memory", "tracker_names"]

# Points kept of each curve: more than a screen shows, little enough to save with every state.
MOST_POINTS = 2048


@dataclass
class Series:
    """A curve over steps, of bounded size.

    When it is full, neighbouring points are merged into their mean, and from then on each point
    is the mean of twice as many values (`stride`), placed at the last one's step.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    stride: int = 1
    pending: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Append the value measured at `step`."""
        self.pending.append(value)
        if len(self.pending) < self.stride:
            return
        self.steps.append(step)
        self.values.append(sum(self.pending) / self.stride)
        self.pending.clear()
        if len(self.steps) == MOST_POINTS:
            self.steps = self.steps[1::2]
            pairs = zip(self.values[::2], self.values[1::2], strict=True)
            self.values = [(left + right) / 2 for left, right in pairs]
            self.stride *= 2


class Report:
    """Takes the figures of every step. Only the main process shows and logs them.

    Names of scalars are stock's: loss/current, loss/average, loss/epoch_average, lr/<group>,
    loss/validation/{step,epoch}_{average,divergence}; `extras` come with names of their own.
    """

    def __init__(
        self, options: Options, total_steps: int, total_epochs: int, is_main: bool = True
    ) -> None:
        self.options = options
        self.total_steps = total_steps
        self.total_epochs = total_epochs
        self.is_main = is_main
        self.series: dict[str, Series] = {}
        self.samples: list[Sample] = []
        self._trackers = Trackers(options) if is_main else None
        self._bar: tqdm[Any] | None = None
        self._step = 0
        self._average = float("nan")
        self._started = time.perf_counter()
        self._seconds_before = 0.0  # of the parts of the run before a resume

    def step(
        self,
        step: int,
        epoch: int,
        loss: float,
        average: float,
        lrs: Mapping[str, float],
        extras: Mapping[str, float],
    ) -> None:
        """One step is done. `average` is the mean loss over the last epoch's worth of batches."""
        self._step, self._average = step, average
        values = {"loss/current": loss, "loss/average": average}
        values |= {f"lr/{name}": lr for name, lr in lrs.items()}
        values |= extras
        self._record(values, step, epoch, position=step)
        self._advance(step, epoch, lrs)

    def epoch_end(self, epoch: int, average: float) -> None:
        """An epoch is done; `epoch` counts from 1 and is the place on TensorBoard's axis."""
        self._log({"loss/epoch_average": average}, self._step, epoch, position=epoch)

    def validation(self, step: int, epoch: int, loss: float) -> None:
        """The held-out pictures' loss after `step`, and how far it is from training's average."""
        every = self.options.validate_every_n_steps
        kind = "step" if every and step % every == 0 else "epoch"
        values = {
            f"loss/validation/{kind}_average": loss,
            f"loss/validation/{kind}_divergence": loss - self._average,
        }
        self._record(values, step, epoch, position=step if kind == "step" else epoch)

    def pictures(self, samples: Sequence[Sample]) -> None:
        """Sample pictures were drawn; the trackers show them, and the page at the end."""
        self.samples.extend(samples)
        if self._trackers is not None and samples:
            named = {f"sample_{s.prompt.index}": (s.path, s.prompt.text) for s in samples}
            self._trackers.log_pictures(named, samples[0].step)

    def flush(self) -> None:
        """Show and write what is still held back."""
        if self._bar is not None:
            self._bar.refresh()
        if self._trackers is not None:
            self._trackers.flush()

    def close(self) -> None:
        """End the bar and the trackers; the history stays."""
        if self._bar is not None:
            self._bar.close()
        if self._trackers is not None:
            self._trackers.close()

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, its parts before a resume included."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def history(self) -> dict[str, Any]:
        """All that `restore` needs, in JSON's types."""
        series = {name: asdict(series) for name, series in self.series.items()}
        samples = [{**asdict(sample), "path": str(sample.path)} for sample in self.samples]
        return {"seconds": self.seconds, "series": series, "samples": samples}

    def restore(self, history: Mapping[str, Any]) -> None:
        """Go on from an earlier run's `history`; an empty one changes nothing."""
        self._seconds_before = float(history.get("seconds", 0.0))
        self.series = {
            name: Series(**columns) for name, columns in history.get("series", {}).items()
        }
        self.samples = [
            Sample(**{**fields, "prompt": Prompt(**fields["prompt"]), "path": Path(fields["path"])})
            for fields in history.get("samples", [])
        ]

    def _record(self, values: Mapping[str, float], step: int, epoch: int, position: int) -> None:
        for name, value in values.items():
            self.series.setdefault(name, Series()).add(step, value)
        self._log(values, step, epoch, position)

    def _log(self, values: Mapping[str, float], step: int, epoch: int, position: int) -> None:
        if self._trackers is not None:
            self._trackers.log(values, step, epoch, position)

    def _advance(self, step: int, epoch: int, lrs: Mapping[str, float]) -> None:
        if not self.is_main:
            return
        if self._bar is None:
            # Only now, so that rate and remaining time are not those of the first step's warm-up.
            self._bar = tqdm(total=self.total_steps, initial=step, desc="steps", smoothing=0)
        figures: dict[str, str] = {"avr_loss": f"{self._average:.4f}"}
        if lrs:
            figures["lr"] = f"{max(lrs.values()):.2e}"
        figures["epoch"] = f"{epoch}/{self.total_epochs}"
        self._bar.set_postfix(figures, refresh=False)  # drawn by update, ten times a second at most
        self._bar.update(step - self._bar.n)


def peak_memory() -> tuple[int, str]:
    """The most memory this process has held, in bytes, and which: "GPU memory" or "memory"."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved(), "GPU memory"
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset, "memory"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, "memory"
