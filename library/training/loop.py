"""The loop: micro-batches to steps, steps to epochs, and what happens between them."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from library.optim.engine import NonFiniteGradientError
from library.optim.telemetry import optimizer_report, tell_loss
from library.training.checkpoints import Checkpoints
from library.training.data import Batch, TrainingData
from library.training.interrupt import Interrupt
from library.training.network import Adapter
from library.training.nonfinite import NonFiniteError
from library.training.objective import Objective
from library.training.options import Options
from library.training.plan import Plan
from library.training.processes import average_gradients, gather, mean_over_processes
from library.training.report import Report
from library.training.sampling import Sampler, should_sample
from library.training.snapshots import Snapshots
from library.training.state import (
    Progress,
    TrainingState,
    random_state,
    restore_random_state,
    save_state,
)
from library.training.validation import Validation

log = logging.getLogger(__name__)


@dataclass
class Loop:
    """One run: everything it uses, and where it stands (`progress`)."""

    options: Options
    accelerator: Accelerator
    data: TrainingData
    adapter: Adapter
    objective: Objective
    optimizer: Any  # torch.optim.Optimizer behind accelerate's wrapper
    lr_scheduler: Any
    report: Report
    validation: Validation | None
    plan: Plan
    progress: Progress
    snapshots: Snapshots | None  # in the first process
    # These two need the loop itself.
    checkpoints: Checkpoints = field(init=False)
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.adapter.groups for p in group["params"]]
        # The losses of an epoch's worth of steps: the moving average that stock shows.
        self.recent = deque(self.progress.recent_losses, maxlen=self.plan.steps_per_epoch)

    @property
    def _batches(self) -> int:
        return self.progress.batches_per_epoch

    def run(self, interrupt: Interrupt) -> bool:
        """Train from `progress` to the last step. False if Ctrl-C ended it after an earlier one."""
        if should_sample(self.options, None, 0) and self.progress.step == 0:
            self._sample(epoch=None)
        self.adapter.network.train()
        micro_losses: list[Tensor] = []
        paths: list[str] = []
        for epoch, index, batch in self._batches_from_here():
            if index == 0:
                self.adapter.begin_epoch()
            self.adapter.begin_step()
            size = self._accumulated(index)
            losses = self.objective(batch)
            loss = losses.mean()
            self.accelerator.backward(loss / size)
            micro_losses.append(loss.detach())
            paths.extend(batch.paths)
            if (index + 1) % self.options.gradient_accumulation_steps and index + 1 < self._batches:
                continue
            stops = self._step(torch.stack(micro_losses).mean(), paths, interrupt.requested)
            micro_losses, paths = [], []
            self._advance(epoch, index)
            if self.progress.step >= self.options.max_train_steps or stops:
                break
        self.report.flush()
        return self.progress.step >= self.options.max_train_steps

    def save_final(self) -> Path:
        """Write the adapter as it is now, and the state where that is asked for."""
        with self._inference():
            begun = self.progress.epoch + (self.progress.index > 0)
            return self.checkpoints.at_end(self.progress.step, begun)

    def _batches_from_here(self) -> Iterator[tuple[int, int, Batch]]:
        return iter(
            self.data.loader(
                self.options,
                start=(self.progress.epoch, self.progress.index),
                epochs=self.plan.epochs,
                process_index=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
            )
        )

    def _accumulated(self, index: int) -> int:
        """The micro-batches of the step around `index`; the last of an epoch may have fewer."""
        accumulation = self.options.gradient_accumulation_steps
        first = index - index % accumulation
        return min(accumulation, self._batches - first)

    def _step(self, loss: Tensor, paths: list[str], stops: bool) -> bool:
        """One optimizer step. Whether to stop is decided together: one process may hear Ctrl-C."""
        average_gradients(self.parameters, self.accelerator)
        shared = torch.stack([loss, loss.new_tensor(float(stops))])
        value, stopping = mean_over_processes(shared, self.accelerator).tolist()
        step = self.progress.step + 1
        self._stop_unless_finite(value, step, paths)
        extras: dict[str, float] = {}
        norm = self._clip_gradients()
        if norm is not None:
            self._stop_unless_finite(norm, step, paths)
            extras["norm/gradient"] = norm
        tell_loss(self.bare_optimizer, value)
        self._update(step, paths, stops=stopping > 0)
        extras["norm/weights"] = get_total_norm(self.parameters).item()
        if self.options.scale_weight_norms:
            keys, mean_norm, max_norm = self._scale_weight_norms()
            extras |= {"max_norm/keys_scaled": keys, "max_norm/average": mean_norm}
            extras |= {"max_norm/max": max_norm}
        self.recent.append(value)
        self.progress.step = step
        self.report.step(
            step=step,
            epoch=self.progress.epoch + 1,
            loss=value,
            average=sum(self.recent) / len(self.recent),
            lrs=self._learning_rates(),
            extras=extras | optimizer_report(self.bare_optimizer),
        )
        return stopping > 0

    def _update(self, step: int, paths: list[str], stops: bool) -> None:
        try:
            self.optimizer.step()
        except NonFiniteGradientError as error:  # nothing was changed
            raise self._non_finite(step, paths, str(error)) from error
        if self.snapshots is not None and (stops or self.snapshots.due(step)):
            # With the learning rate that this step had, before the schedule moves on.
            self.snapshots.take(self.bare_optimizer, step)
        if not self.optimizer.step_was_skipped:  # fp16: the scaler skips while it finds its scale
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _clip_gradients(self) -> float | None:
        """The gradients' norm before clipping; None while a gradient scaler finds its scale."""
        self.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.accelerator.scaler is not None and not bool(torch.isfinite(norm)):
            return None  # expected now and then: the scaler skips that step
        if self.options.max_grad_norm:
            clip_grads_with_norm_(self.parameters, self.options.max_grad_norm, norm)
        return norm.item()

    def _scale_weight_norms(self) -> tuple[float, float, float]:
        network: Any = self.adapter.network
        keys, mean_norm, max_norm = network.apply_max_norm_regularization(
            self.options.scale_weight_norms, self.accelerator.device
        )
        return float(keys), float(mean_norm), float(max_norm)

    def _advance(self, epoch: int, index: int) -> None:
        """Move `progress` past the batch just trained on, and do what falls due there."""
        ends_epoch = index + 1 == self._batches
        self.progress.epoch = epoch + 1 if ends_epoch else epoch
        self.progress.index = 0 if ends_epoch else index + 1
        step = self.progress.step
        if should_sample(self.options, None, step):
            self._sample(epoch=None)
        if self._validation_due(self.options.validate_every_n_steps, step):
            self._validate(epoch + 1)
        self._save(lambda: self.checkpoints.at_step(step, epoch))
        if not ends_epoch and step < self.options.max_train_steps:
            return
        # The last step ends its epoch in any case, as in stock.
        self.report.epoch_end(epoch + 1, sum(self.recent) / len(self.recent))
        if self._validates_after_epoch(epoch + 1):
            self._validate(epoch + 1)
        self._save(lambda: self.checkpoints.at_epoch(step, epoch + 1))
        if should_sample(self.options, epoch + 1, step):
            self._sample(epoch=epoch + 1)

    @staticmethod
    def _validation_due(every: int | None, number: int) -> bool:
        return bool(every) and number % (every or 1) == 0

    def _validates_after_epoch(self, epoch: int) -> bool:
        if self.options.validate_every_n_epochs is None:
            return self.options.validate_every_n_steps is None
        return self._validation_due(self.options.validate_every_n_epochs, epoch)

    def _validate(self, epoch: int) -> None:
        if self.validation is None:
            return
        with self._inference():
            loss = self.validation.loss(self.objective)
        self.report.validation(self.progress.step, epoch, loss)

    def _sample(self, epoch: int | None) -> None:
        if self.sampler is not None and self.accelerator.is_main_process:
            with self._inference():
                self.sampler.draw(epoch, self.progress.step)
        self.accelerator.wait_for_everyone()

    def _save(self, save: Any) -> None:
        with self._inference():
            save()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Adapter and optimizer as they are for use, then back to training."""
        self.adapter.network.eval()
        with optimizer_evaluates(self.bare_optimizer):
            yield
        self.adapter.network.train()

    @property
    def bare_optimizer(self) -> torch.optim.Optimizer:
        bare: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return bare

    def _learning_rates(self) -> dict[str, float]:
        groups = self.bare_optimizer.param_groups
        return {
            label: float(group["lr"])
            for label, group in zip(self.adapter.group_labels, groups, strict=True)
        }

    def _stop_unless_finite(self, value: float, step: int, paths: list[str]) -> None:
        if not math.isfinite(value):
            raise self._non_finite(step, paths)

    def _non_finite(self, step: int, paths: list[str], detail: str = "") -> NonFiniteError:
        # The figure was common to all processes, so all are here and can tell their pictures.
        everyones: Any = gather(paths, self.accelerator)
        pictures = [path for each in everyones for path in each]
        return NonFiniteError.at(step, pictures, self.adapter.network, detail)

    def state(self) -> TrainingState:
        """Everything needed to go on from here, bit for bit. Every process must call it."""
        self.progress.recent_losses = list(self.recent)
        self.progress.history = self.report.history
        scaler = self.accelerator.scaler
        entries: Any = gather(random_state(), self.accelerator)
        return TrainingState(
            progress=self.progress,
            network=self.adapter.training_state(),
            optimizer=self.bare_optimizer.state_dict(),
            lr_scheduler=self.lr_scheduler.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else {},
            random=entries,
        )

    def write_state(self, path: Path) -> None:
        """Write the state as the folder `path`. Every process must call it; the first writes."""
        state = self.state()
        if self.accelerator.is_main_process:
            save_state(path, state)
            log.info("saved %s", path)
        self.accelerator.wait_for_everyone()

    def restore(self, state: TrainingState) -> None:
        """Go on from `state`: weights, optimizer, schedule and generators.

        UserError if it is that of another network.
        """
        self.adapter.load_training_state(state.network)
        self.bare_optimizer.load_state_dict(state.optimizer)
        if evaluates(self.bare_optimizer):
            self.bare_optimizer.train()  # type: ignore[attr-defined]  # saved as it is for use
        self.lr_scheduler.load_state_dict(state.lr_scheduler)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        if len(state.random) == self.accelerator.num_processes:
            restore_random_state(state.random[self.accelerator.process_index])
        self.report.restore(state.progress.history)


def evaluates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has other weights for use than for training (schedule-free ones do)."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


@contextmanager
def optimizer_evaluates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give the parameters their values for use, then those for training again."""
    if evaluates(optimizer):
        optimizer.eval()  # type: ignore[attr-defined]
    yield
    if evaluates(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
