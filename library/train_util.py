"""Stock's names, for programs that import its modules (`from library.train_util import …`).

They take what `train_network.setup_parser().parse_args()` returns, or a namespace with fewer or
more options. The work is done in `library/optim/registry.py` and `library/training`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.optim.registry import create_optimizer, relative_step
from library.training import lr_schedule
from library.training.errors import UserError
from library.training.option_checks import optimizer_choice
from library.training.options import Options
from library.training.run_checks import check_optimizer
from library.training.settle import settle

__all__ = [
    "get_optimizer",
    "get_optimizer_train_eval_fn",
    "get_scheduler_fix",
    "is_schedulefree_optimizer",
]


def get_optimizer(
    args: argparse.Namespace, trainable_params: Iterable[Any]
) -> tuple[str, str, Optimizer]:
    """The optimizer that `args` ask for, in training mode.

    Args:
        trainable_params: tensors, or parameter groups as `prepare_optimizer_params` returns them.

    Returns:
        the class's path, its arguments as text, the optimizer.

    An Adafactor that chooses its own step size has its effect on `args` as in stock: they then ask
    for its schedule, and for no learning rates.

    Raises:
        UserError: no such optimizer, a package that is missing, or an argument that it cannot have.
    """
    options = settle(Options.from_namespace(args))
    problems = list(optimizer_choice(options))
    arguments = check_optimizer(options, problems)
    if problems:
        raise UserError.listing(problems)
    groups = list(trainable_params)
    made = create_optimizer(options.optimizer_type, groups, options.learning_rate, arguments)
    if relative_step(options.optimizer_type, arguments):
        args.lr_scheduler = f"adafactor:{options.learning_rate}"
        args.learning_rate = None
        if any(isinstance(group, dict) and "lr" in group for group in groups):
            args.unet_lr = args.text_encoder_lr = None
    return made


def get_scheduler_fix(
    args: argparse.Namespace, optimizer: Optimizer, num_processes: int
) -> LRScheduler:
    """The schedule that `args` ask for; its `step` is called once a step and process.

    Raises:
        UserError: no such schedule, or options that do not make one.
    """
    options = settle(Options.from_namespace(args))
    return lr_schedule.get_scheduler_fix(options, optimizer, num_processes)


def is_schedulefree_optimizer(optimizer: Optimizer, args: argparse.Namespace) -> bool:
    """Whether it is of the schedule-free kind, whose weights for use are an average."""
    return lr_schedule.is_schedule_free(Options.from_namespace(args), optimizer)


def get_optimizer_train_eval_fn(
    optimizer: Any, args: argparse.Namespace
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What to call before training, and before sampling or saving; neither does anything where the
    optimizer is not schedule-free."""
    if is_schedulefree_optimizer(optimizer, args):
        return optimizer.train, optimizer.eval
    return _nothing, _nothing


def _nothing() -> None:
    pass
