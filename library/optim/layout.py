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
        block: int32 `[blocks]`, each block's index in its own tensor.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes = tuple(sizes)
        self._blocks = [-(-size // BLOCK) for size in sizes]
        counts = torch.tensor(self._blocks)
        ends = counts.cumsum(0)
        owner = torch.repeat_interleave(torch.arange(len(self.sizes)), counts)
        first = (ends - counts)[owner]
        self.owner = owner.to(device)
        self.block = (torch.arange(len(owner)) - first).to(torch.int32).to(device)
        self._offsets = torch.cat([ends.new_zeros(1), ends]).to(device)
        # Sizes of the pieces of the flat matrix: tensor, padding, tensor, padding, …
        self._pieces = [n for size in self.sizes for n in (size, -size % BLOCK)]
        self._padded = any(self._pieces[1::2])

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

    def sum(self, matrix: Tensor) -> Tensor:
        """Per-tensor sums, float64 `[tensors]`, of a `[blocks, 256]` matrix.

        Blocks are summed in the matrix's own precision, block sums in float64 in a fixed order.
        """
        per_block = matrix.sum(1).double()
        return torch.segment_reduce(per_block, "sum", offsets=self._offsets, axis=0, unsafe=True)

    def spread(self, per_tensor: Tensor) -> Tensor:
        """A per-tensor vector `[tensors]` as `[blocks, 1]`, to meet matrices elementwise."""
        return per_tensor[self.owner].unsqueeze(1)


@lru_cache(maxsize=256)
def layout_of(sizes: tuple[int, ...], device: torch.device) -> Layout:
    """The layout for these sizes; kept, because the same ones come back every step."""
    return Layout(sizes, device)
