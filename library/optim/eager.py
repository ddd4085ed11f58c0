"""The chain on tensors, by PyTorch's own operations: where nothing can be compiled.

Parameters are taken in pieces and laid end to end as one `[blocks, 256]` matrix: an operation on
each of two thousand small tensors would cost far more in dispatch than in arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from . import noise
from .batch import Turn
from .chain import PER_TENSOR, Variant, advance
from .layout import BLOCK, Layout, layout_of
from .lines import Axis, lines_of
from .native.graph import ChainGraph
from .state import block_maxima, unpack_high

# Elements that run through the chain together, with a dozen float32 matrices of as many: a megabyte
# each on a processor, 32 MB on devices, where starting an operation costs more than a million of
# numbers.
PIECE_ON_CPU = 1 << 18
PIECE_ELSEWHERE = 1 << 23


def run(turn: Turn) -> dict[str, Tensor]:
    """One step of the turn's parameters; returns the report, `[active]` by name.

    Raises:
        UntranslatableError: a line of a technique would mix tensors up.
    """
    _check(turn.batch.variant)
    reports = [_run_piece(turn, piece) for piece in _pieces(turn)]
    return {name: torch.cat([report[name] for report in reports]) for name in reports[0]}


@lru_cache(maxsize=64)
def _check(variant: Variant) -> None:
    """Run the chain on symbols first: there a quantity that was not spread cannot happen to fit."""
    ChainGraph(replace(variant, dtype=variant.maths, stochastic=False))


def _pieces(turn: Turn) -> Iterator[slice]:
    on_cpu = turn.batch.variant.device.type == "cpu"
    most = PIECE_ON_CPU if on_cpu else PIECE_ELSEWHERE
    start, filled = 0, 0
    for end, param in enumerate(turn.params):
        size = -(-param.numel() // BLOCK) * BLOCK
        if filled and filled + size > most:
            yield slice(start, end)
            start, filled = end, 0
        filled += size
    yield slice(start, len(turn.params))


class _Blocks:
    """Where the tensors of a piece and their lines lie, with this step's noise."""

    def __init__(
        self, shapes: Sequence[torch.Size], device: torch.device, seeds: Tensor, dtype: torch.dtype
    ) -> None:
        self._shapes, self._device, self._seeds, self._dtype = shapes, device, seeds, dtype
        self.elements = layout_of(tuple(shape.numel() for shape in shapes), device)

    def of(self, axis: Axis | None) -> Layout:
        """Where there is a number for each line of an axis, or for each element."""
        if axis is None:
            return self.elements
        return layout_of(tuple(lines_of(s, axis).number for s in self._shapes), self._device)

    def sum(self, matrix: Tensor) -> Tensor:
        return self.elements.sum(matrix)

    def spread(self, per_tensor: Tensor) -> Tensor:
        return self._spread(per_tensor, self.elements)

    def to_lines(self, per_tensor: Tensor, axis: Axis) -> Tensor:
        return self._spread(per_tensor, self.of(axis))

    def _spread(self, per_tensor: Tensor, layout: Layout) -> Tensor:
        truth = per_tensor.dtype == torch.bool
        return layout.spread(per_tensor if truth else per_tensor.to(self._dtype))

    def line_sum(self, matrix: Tensor, axis: Axis) -> Tensor:
        return self._reduce(matrix, axis, lambda one: one.sum(1))

    def line_mean(self, matrix: Tensor, axis: Axis) -> Tensor:
        return self._reduce(matrix, axis, lambda one: one.mean(1))

    def _reduce(self, matrix: Tensor, axis: Axis, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        shapes = [torch.Size(lines_of(shape, axis)) for shape in self._shapes]
        parts = self.elements.split(matrix.to(self._dtype), shapes)
        return self.of(axis).gather([reduce(part) for part in parts], self._dtype)

    def spread_lines(self, lines: Tensor, axis: Axis) -> Tensor:
        seen = [lines_of(shape, axis) for shape in self._shapes]
        shapes = [torch.Size([outer, 1, inner]) for outer, _, inner in seen]
        parts = zip(self.of(axis).split(lines, shapes), seen, strict=True)
        return self.elements.gather([part.expand(to) for part, to in parts], lines.dtype)

    def mean_of_rows(self, rows: Tensor) -> Tensor:
        layout = self.of("row")
        heights = [shape[-2] if len(shape) > 1 else 1 for shape in self._shapes]
        shapes = [
            torch.Size([lines_of(shape, "row").number // height, height])
            for shape, height in zip(self._shapes, heights, strict=True)
        ]
        parts = layout.split(rows, shapes)
        means = [part.mean(1, keepdim=True).expand(part.shape) for part in parts]
        return layout.gather(means, rows.dtype)

    def largest(self, matrix: Tensor) -> Tensor:
        return block_maxima(matrix)

    def noise(self, number: int, axis: Axis | None = None) -> Tensor:
        layout = self.of(axis)
        return noise.draw(self._seeds[layout.owner], layout.block, number)


def _run_piece(turn: Turn, piece: slice) -> dict[str, Tensor]:
    variant = turn.batch.variant
    params, entries = turn.params[piece], turn.entries[piece]
    shapes = [param.shape for param in params]
    numbers = turn.numbers[:, piece]
    keys = torch.tensor([entry["noise_key"] for entry in entries], dtype=torch.int32)
    seeds = noise.seeds(keys.to(variant.device), numbers[1])
    blocks = _Blocks(shapes, variant.device, seeds, variant.maths)
    held = {}
    for slot in variant.slots:
        layout = blocks.of(slot.axis)
        kept = [entry[slot.name] for entry in entries]
        if slot.kind == "scalar":
            held[slot.name] = torch.stack(kept).double()
        elif slot.coded:
            held[slot.name] = layout.gather(kept, torch.int32)
            scales = torch.cat([entry[slot.scale] for entry in entries])
            held[slot.scale] = scales.unsqueeze(1)
        elif slot.kind == "packed":
            held[slot.name] = layout.gather(kept, torch.int32)
            held[slot.high] = unpack_high(torch.cat([entry[slot.high] for entry in entries]))
        else:
            whole = slot.kind in ("whole", "byte")
            held[slot.name] = layout.gather(kept, torch.int32 if whole else variant.maths)
    new_p, after, report = advance(
        variant,
        held,
        blocks.elements.gather(params, variant.maths),
        blocks.elements.gather(turn.grads[piece], variant.maths),
        dict(zip(PER_TENSOR, numbers.unbind(), strict=True)),
        {key: factor[piece] for key, factor in turn.factors.items()},
        blocks,
    )
    torch._foreach_copy_(params, blocks.elements.split(new_p, shapes))
    for slot in variant.slots:
        if slot.name not in after:
            continue
        value, layout = after[slot.name], blocks.of(slot.axis)
        kept = [entry[slot.name] for entry in entries]
        own_shapes = [one.shape for one in kept]
        parts = list(value.unbind()) if slot.kind == "scalar" else layout.split(value, own_shapes)
        torch._foreach_copy_(kept, parts)
        if slot.coded:
            parts = list(layout.split_blocks(after[slot.scale].squeeze(1)))
            torch._foreach_copy_([entry[slot.scale] for entry in entries], parts)
    return report
