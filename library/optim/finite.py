"""Whether gradients are finite: asked once a step, before anything moves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite: at most one synchronisation with each device."""
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_device[tensor.device].append(tensor)
    return all(map(_all_finite, by_device.values()))


def _all_finite(tensors: list[Tensor]) -> bool:
    """A norm is finite if all numbers are, unless their squares overflow: then a second look."""
    if bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
