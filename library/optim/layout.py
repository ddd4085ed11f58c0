"""Many tensors as one `[blocks, 256]` matrix, and back.

An adapter is hundreds of small tensors; an operation on each of them costs far more in dispatch
than in arithmetic. Laid end to end, every tensor padded with zeros to whole blocks, they need one
operation for all. A block belongs to one tensor, so per-tensor sums are sums over its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256


class Layout:
    """Where tensors of given sizes lie in one matrix.

    What is computed for a tensor through a layout does not depend on which other tensors share it:
    results stay the same, bit for bit, when parameters are grouped differently.

    Args:
        sizes: number of elements of each tensor.
        device: where the matrix lies.

    Attributes:
        owner: `[blocks]`, the tensor that each block belongs to.
        numel: `[tensors]`, the sizes as float32.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes = tuple(sizes)
        self._blocks = [-(-size // BLOCK) for size in sizes]
        counts = torch.tensor(self._blocks)
        ends = counts.cumsum(0)
        owner = torch.repeat_interleave(torch.arange(len(self.sizes)), counts)
        first = (ends - counts)[owner]
        start = (torch.arange(len(owner)) - first)[:, None] * BLOCK
        self.owner = owner.to(device)
        self.numel = torch.tensor(self.sizes, dtype=torch.float32).to(device)
        self._start = start.to(torch.int32).to(device)
        self._within = torch.arange(BLOCK, dtype=torch.int32).to(device)
        self._offsets = torch.cat([ends.new_zeros(1), ends]).to(device)
        # Sizes of the pieces of the flat matrix: tensor, padding, tensor, padding, …
        self._pieces = [n for size in self.sizes for n in (size, -size % BLOCK)]
        self._padded = any(self._pieces[1::2])

    @property
    def position(self) -> Tensor:
        """`[blocks, 256]` int32: each element's index in its own tensor."""
        return self._start + self._within

    def gather(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The tensors as one `[blocks, 256]` matrix, zeros where nothing lies."""
        parts = [tensor.reshape(-1) for tensor in tensors]
        if self._padded:
            zeros = parts[0].new_zeros(BLOCK)
            pads = (zeros[:pad] for pad in self._pieces[1::2])
            parts = [part for both in zip(parts, pads, strict=True) for part in both]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        return flat.view(-1, BLOCK).to(dtype)

    def split(self, matrix: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Views into a `[blocks, 256]` matrix, one for each tensor, in the tensors' shapes."""
        pieces = matrix.view(-1).split(self._pieces)[::2]
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def split_blocks(self, per_block: Tensor) -> Sequence[Tensor]:
        """Views into a `[blocks]` vector, one for each tensor."""
        return per_block.split(self._blocks)

    def sum(self, *terms: Tensor) -> tuple[Tensor, ...]:
        """Per-tensor sums `[tensors]` of `[blocks, 256]` matrices.

        Blocks are summed in the terms' own precision, block sums in float64 in a fixed order.
        """
        per_block = torch.stack([term.sum(1) for term in terms], 1)
        per_tensor = torch.segment_reduce(
            per_block.double(), "sum", offsets=self._offsets, axis=0, unsafe=True
        )
        return per_tensor.to(per_block.dtype).unbind(1)

    def spread(self, per_tensor: Tensor) -> Tensor:
        """A per-tensor vector `[tensors]` as `[blocks, 1]`, to meet matrices elementwise."""
        return per_tensor[self.owner].unsqueeze(1)


@lru_cache(maxsize=256)
def layout_of(sizes: tuple[int, ...], device: torch.device) -> Layout:
    """The layout for these sizes; kept, because the same ones come back every step."""
    return Layout(sizes, device)


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Σx² of each tensor, `[tensors]` in float32; all on one device."""
    layout = layout_of(tuple(t.numel() for t in tensors), tensors[0].device)
    matrix = layout.gather([t.float() for t in tensors], torch.float32)
    return layout.sum(matrix * matrix)[0]
