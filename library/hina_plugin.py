"""The plugin's place in sd-scripts: its optimizers by short name, with names for all parameters.

`python -m patches apply` copies this file and puts three lines into two of stock's files, which
call `extend` and `name_groups`. Whoever uses an optimizer of stock's notices nothing of it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from library.optim.naming import is_of_network
from library.optim.naming import name_groups as with_names
from library.optim.registry import create_optimizer, of_family, parse_optimizer_args
from library.optim.telemetry import optimizer_report, optimizer_summary

VERSION = "0.1.0"

logger = logging.getLogger(__name__)

GetOptimizer = Callable[..., "tuple[str, str, Any]"]

_REPORTED_STEPS = (1, 2, 10, 100)
_REPORT_EVERY = 1000


def extend(get_optimizer: GetOptimizer) -> GetOptimizer:
    """Stock's `get_optimizer(args, trainable_params)`, which knows our optimizers too."""

    @functools.wraps(get_optimizer)
    def extended(args: Any, trainable_params: Iterable[Any]) -> tuple[str, str, Any]:
        if _is_ours(args):
            return _create(args, trainable_params)
        return get_optimizer(args, trainable_params)

    return extended


def name_groups(args: Any, network: torch.nn.Module, trainable_params: Iterable[Any]) -> Any:
    """The parameter groups of any network module, with a name for every tensor if the optimizer is
    ours; others get them as they are."""
    return with_names(network, trainable_params) if _is_ours(args) else trainable_params


def _is_ours(args: Any) -> bool:
    return bool(args.optimizer_type) and of_family(args.optimizer_type)


def _create(args: Any, trainable_params: Iterable[Any]) -> tuple[str, str, Any]:
    """Build one of our optimizers, and tell the log what it has found.

    Raises:
        ValueError: an option that contradicts it, or an impossible argument.
    """
    for option in ("use_8bit_adam", "use_lion_optimizer", "fused_backward_pass"):
        if getattr(args, option, False):
            raise ValueError(f"--{option} does not go with --optimizer_type {args.optimizer_type}.")
    groups = list(trainable_params)
    kwargs = parse_optimizer_args(args.optimizer_args)
    name, arguments, optimizer = create_optimizer(
        args.optimizer_type, groups, args.learning_rate, kwargs
    )
    for line in (*_found(optimizer), *optimizer_summary(optimizer)):
        logger.info("%s", line)
    optimizer.register_step_post_hook(_Reporter())
    return name, arguments, optimizer


def _found(optimizer: Any) -> list[str]:
    """How many parameters have names, and what the names told."""
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    found = sum(map(is_of_network, names))
    total = sum(len(group["params"]) for group in optimizer.param_groups)
    info = optimizer.get_optimization_info()
    return [
        f"{type(optimizer).__name__} (hina plugin {VERSION}): names for {found} of {total} "
        f"parameters in {len(optimizer.param_groups)} groups",
        *(f"{key}: {info[key]}" for key in ("lora_stats", "lokr_stats") if key in info),
    ]


class _Reporter:
    """Tells the log what the optimizer did, now and then: stock has no place for such figures."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, optimizer: Any, *_: Any) -> None:
        self.steps += 1
        if self.steps in _REPORTED_STEPS or self.steps % _REPORT_EVERY == 0:
            figures = (f"{name}={value:.4g}" for name, value in optimizer_report(optimizer).items())
            logger.info("step %d: %s", self.steps, " ".join(figures))
