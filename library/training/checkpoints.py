"""When and under which name a run is saved, and which older files go.

Names and retention are stock's: `NAME-000002.safetensors` after epochs, `NAME-step00000500…` after
steps, `NAME.safetensors` at the end, states with `-state` behind.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from library.training.errors import UserError
from library.training.files import write_atomically
from library.training.options import Options

log = logging.getLogger(__name__)

PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_precision(options: Options) -> torch.dtype | None:
    """The dtype of saved weights; None keeps them as they are trained (stock's default)."""
    return PRECISIONS[options.save_precision] if options.save_precision else None


@dataclass
class Checkpoints:
    """Saves the adapter (`state_dict`, `metadata`) and the state (`save_state`) of one run.

    Every process calls it, since collecting a state takes all of them; `is_main` writes.
    """

    options: Options
    state_dict: Callable[[torch.dtype | None], dict[str, torch.Tensor]]
    metadata: Callable[[dict[str, torch.Tensor], int, int], dict[str, str]]  # tensors, steps, epoch
    save_state: Callable[[Path], object]
    total_epochs: int
    is_main: bool = True

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir or ".")

    @property
    def suffix(self) -> str:
        return "." + (self.options.save_model_as or "safetensors")

    def at_step(self, step: int, epoch: int) -> None:
        """Save if `--save_every_n_steps` says so; `step` counts from 1."""
        every = self.options.save_every_n_steps
        if not every or step % every:
            return
        self.adapter(f"{self._name}-step{step:08d}", step, epoch)
        self._remove_older(step, every, self.options.save_last_n_steps, self._step_file)
        if self.options.save_state:
            self.save_state(self._step_state(step))
            keep = self.options.save_last_n_steps_state or self.options.save_last_n_steps
            self._remove_older(step, every, keep, self._step_state)

    def at_epoch(self, step: int, epoch: int) -> None:
        """Save if `--save_every_n_epochs` says so; the last epoch is left to `at_end`."""
        every = self.epoch_interval()
        if not every or epoch % every or epoch >= self.total_epochs:
            return
        self.adapter(f"{self._name}-{epoch:06d}", step, epoch)
        keep = self.options.save_last_n_epochs
        self._remove_older(epoch, every, keep and keep * every - 1, self._epoch_file)
        if self.options.save_state:
            self.save_state(self._epoch_state(epoch))
            keep = self.options.save_last_n_epochs_state or keep
            self._remove_older(epoch, every, keep and keep * every - 1, self._epoch_state)

    def at_end(self, step: int, epoch: int) -> Path:
        """Save the final adapter, and the state where it is asked for."""
        path = self.adapter(self._name, step, epoch)
        if self.options.save_state or self.options.save_state_on_train_end:
            self.save_state(self.folder / f"{self._name}-state")
        return path

    def adapter(self, name: str, step: int, epoch: int) -> Path:
        """Write the adapter file `name`; weights that are not finite are never written."""
        path = self.folder / (name + self.suffix)
        if not self.is_main:
            return path
        tensors = self.state_dict(save_precision(self.options))
        bad = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
        if bad:
            raise UserError(
                f"{path} was not written: {len(bad)} of its {len(tensors)} tensors hold NaN or inf "
                f"(first: {bad[0]}). Files saved before this are untouched. Lower --learning_rate, "
                "or save in a wider --save_precision if the values overflow only there."
            )
        metadata = self.metadata(tensors, step, epoch)

        def write(file: Path) -> None:
            if self.suffix == ".safetensors":
                save_file(tensors, str(file), metadata=metadata)
            else:
                torch.save(tensors, file)

        write_atomically(path, write)
        log.info("saved %s", path)
        return path

    def epoch_interval(self) -> int | None:
        """`--save_every_n_epochs`, or what `--save_n_epoch_ratio` makes of it."""
        if self.options.save_n_epoch_ratio:
            return max(1, self.total_epochs // self.options.save_n_epoch_ratio)
        return self.options.save_every_n_epochs

    @property
    def _name(self) -> str:
        return self.options.output_name or "last"

    def _step_file(self, step: int) -> Path:
        return self.folder / f"{self._name}-step{step:08d}{self.suffix}"

    def _epoch_file(self, epoch: int) -> Path:
        return self.folder / f"{self._name}-{epoch:06d}{self.suffix}"

    def _step_state(self, step: int) -> Path:
        return self.folder / f"{self._name}-step{step:08d}-state"

    def _epoch_state(self, epoch: int) -> Path:
        return self.folder / f"{self._name}-{epoch:06d}-state"

    def _remove_older(
        self, current: int, every: int, keep: int | None, path_of: Callable[[int], Path]
    ) -> None:
        """Remove the one save that is now more than `keep` steps (or epochs) older than `current`.

        Only that one: files of an earlier run under the same name are the user's.
        """
        if keep is None or not self.is_main:
            return
        number = (current - keep - 1) // every * every
        path = path_of(number)
        if number <= 0 or not path.exists():
            return
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        log.info("removed %s", path)
