"""Whether gradients are finite: asked once a step, before anything moves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Turn
from .native import functions as native


def all_finite(turns: Sequence[Turn], compiled: bool) -> bool:
    """Whether every gradient is finite: at most one synchronisation with a device.

    Args:
        compiled: whether machine code may be used for what lies on the processor.
    """
    others: dict[torch.device, list[Tensor]] = defaultdict(list)
    for turn in turns:
        if compiled and native.fits(turn.batch.variant.device, turn.batch.variant.dtype):
            if not native.all_finite(turn.grads, turn.batch.numel[turn.index]):
                return False
        else:
            others[turn.batch.variant.device].extend(turn.grads)
    return all(_all_finite(some) for some in others.values())


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    """A norm is finite if all numbers are, unless their squares overflow: then a second look."""
    if bool(torch.stack(torch._foreach_norm(list(tensors))).isfinite().all()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
