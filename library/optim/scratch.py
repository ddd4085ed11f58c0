"""Scratch memory that is used again, instead of being allocated at every use."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_MOST = 3  # buffers of one kind


class ScratchPool:
    """float32 buffers, at most three of a size and device.

    Sizes are powers of two, so that many shapes share few buffers.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.device], list[Tensor]] = defaultdict(list)

    @contextmanager
    def take(self, shape: Sequence[int], device: torch.device) -> Iterator[Tensor]:
        """A buffer of this shape with anything in it, which goes back at the end."""
        size = math.prod(shape)
        kind = (1 << max(size - 1, 0).bit_length(), device)
        free = self._free[kind]
        buffer = free.pop() if free else torch.empty(kind[0], device=device)
        yield buffer[:size].view(tuple(shape))
        if len(free) < _MOST:
            free.append(buffer)

    def clear(self) -> None:
        """Free all that is not in use."""
        self._free.clear()

    def stats(self) -> dict[str, float]:
        """How many kinds of buffers and how many buffers are kept, and their size in MiB."""
        buffers = [buffer for free in self._free.values() for buffer in free]
        return {
            "total_buffer_types": sum(bool(free) for free in self._free.values()),
            "total_buffers": len(buffers),
            "estimated_memory_mb": sum(b.nbytes for b in buffers) / 2**20,
        }
