"""Where a run begins, and how many steps and epochs it has."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from library.training.errors import UserError
from library.training.options import Options
from library.training.state import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The length of a run, from its very beginning.

    Attributes:
        steps_per_epoch: optimizer steps an epoch; the last may have fewer micro-batches.
        steps: the number of the last step.
        epochs: how many are begun, the one that the last step lies in included.
    """

    steps_per_epoch: int
    steps: int
    epochs: int


def begin(options: Options, saved: Progress | None, batches: int, num_processes: int) -> Progress:
    """Where the run starts: at the beginning, where `saved` left off, or where --initial_… says.

    A begun epoch goes on only if its batches are still the same ones.
    """
    progress = saved or Progress()
    before = (progress.batches_per_epoch, progress.num_processes)
    if saved is not None and progress.index and before != (batches, num_processes):
        log.warning(
            "the state was saved with %d batches an epoch on %d process(es), now there are %d on "
            "%d: epoch %d starts anew",
            *(*before, batches, num_processes, progress.epoch + 1),
        )
        progress.index = 0
    if saved is not None and progress.seed != options.seed:
        log.warning(
            "the state was saved by a run with --seed %d, this one has --seed %d: order, captions "
            "and noise are others than they would have been",
            *(progress.seed, options.seed),
        )
    # Another accumulation may put the place inside a step: it is begun anew.
    progress.index -= progress.index % options.gradient_accumulation_steps
    per_epoch = math.ceil(batches / options.gradient_accumulation_steps)
    first = options.initial_step
    if first is None and options.initial_epoch is not None:
        first = (options.initial_epoch - 1) * per_epoch
    if first:
        progress.step = first
        progress.epoch, done = divmod(first, per_epoch)
        # Without skip_until_initial_step only the counting begins there, as in stock.
        skips = options.skip_until_initial_step
        progress.index = done * options.gradient_accumulation_steps if skips else 0
    progress.batches_per_epoch, progress.num_processes = batches, num_processes
    progress.seed = options.seed or 0
    return progress


def plan_run(options: Options, start: Progress) -> Plan:
    """The run's length by `--max_train_epochs`, or else by `--max_train_steps`.

    UserError if it would end where it starts. A state of a run with longer or shorter epochs keeps
    its count of steps and of epochs; those still to come have the length of today's.
    """
    accumulation = options.gradient_accumulation_steps
    per_epoch = math.ceil(start.batches_per_epoch / accumulation)
    epoch_began = start.step - start.index // accumulation
    steps = options.max_train_steps
    if options.max_train_epochs:
        steps = epoch_began + (options.max_train_epochs - start.epoch) * per_epoch
    if start.step >= steps:
        last = f"{steps} (--max_train_steps, --max_train_epochs)"
        raise UserError(
            f"the run would begin after step {start.step} (--resume, --initial_step, "
            f"--initial_epoch) and end at {last}: nothing is left to do. "
            "These count from the run's very beginning; raise them to train on."
        )
    epochs = start.epoch + math.ceil((steps - epoch_began) / per_epoch)
    return Plan(per_epoch, steps, epochs)
