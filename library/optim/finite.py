"""Whether gradients are finite: asked once a step, before anything moves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .native import functions as native


def all_finite(tensors: Sequence[Tensor], compiled: bool) -> bool:
    """Whether every number in all tensors is finite: at most one synchronisation with a device.

    Args:
        compiled: whether machine code may be used for what lies on the processor.
    """
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    fast = []
    for tensor in tensors:
        if compiled and native.can_check(tensor):
            fast.append(tensor)
        else:
            by_device[tensor.device].append(tensor)
    if fast and not native.all_finite(fast):
        return False
    return all(_all_finite(some) for some in by_device.values())


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    """A norm is finite if all numbers are, unless their squares overflow: then a second look."""
    if bool(torch.stack(torch._foreach_norm(list(tensors))).isfinite().all()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
