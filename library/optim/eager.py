"""The chain on tensors, by PyTorch's own operations: where nothing can be compiled.

Parameters are taken in pieces and laid end to end as one `[blocks, 256]` matrix: an operation on
each of two thousand small tensors would cost far more in dispatch than in arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from . import noise
from .batch import Turn
from .chain import PER_TENSOR, Variant, advance
from .layout import BLOCK, Layout, layout_of
from .native.graph import ChainGraph
from .state import block_maxima, unpack_high
from .techniques.base import Technique

# Elements that run through the chain together, with a dozen float32 matrices of as many: a megabyte
# each on a processor, 32 MB on devices, where starting an operation costs more than a million of
# numbers.
PIECE_ON_CPU = 1 << 18
PIECE_ELSEWHERE = 1 << 23


def run(chain: Sequence[Technique], turn: Turn) -> dict[str, Tensor]:
    """One step of the turn's parameters; returns the report, `[active]` by name.

    Raises:
        UntranslatableError: a line of a technique would mix tensors up.
    """
    _check(tuple(chain), turn.batch.variant)
    reports = [_run_piece(chain, turn, piece) for piece in _pieces(turn)]
    return {name: torch.cat([report[name] for report in reports]) for name in reports[0]}


@lru_cache(maxsize=64)
def _check(chain: tuple[Technique, ...], variant: Variant) -> None:
    """Run the chain on symbols first: there a quantity that was not spread cannot happen to fit."""
    ChainGraph(chain, replace(variant, dtype=variant.maths, stochastic=False))


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
    """A layout with this step's noise."""

    def __init__(self, layout: Layout, seeds: Tensor, dtype: torch.dtype) -> None:
        self._layout, self._seeds, self._dtype = layout, seeds, dtype

    def sum(self, matrix: Tensor) -> Tensor:
        return self._layout.sum(matrix)

    def spread(self, per_tensor: Tensor) -> Tensor:
        truth = per_tensor.dtype == torch.bool
        return self._layout.spread(per_tensor if truth else per_tensor.to(self._dtype))

    def largest(self, matrix: Tensor) -> Tensor:
        return block_maxima(matrix)

    def noise(self, number: int) -> Tensor:
        return noise.draw(self._seeds[self._layout.owner], self._layout.block, number)


def _run_piece(chain: Sequence[Technique], turn: Turn, piece: slice) -> dict[str, Tensor]:
    variant = turn.batch.variant
    params, entries = turn.params[piece], turn.entries[piece]
    layout = layout_of(tuple(param.numel() for param in params), variant.device)
    held = {}
    for slot in variant.slots:
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
            whole = slot.kind == "whole"
            held[slot.name] = layout.gather(kept, torch.int32 if whole else variant.maths)
    numbers = turn.numbers[:, piece]
    keys = torch.tensor([entry["noise_key"] for entry in entries], dtype=torch.int32)
    seeds = noise.seeds(keys.to(variant.device), numbers[1])
    new_p, after, report = advance(
        chain,
        variant,
        held,
        layout.gather(params, variant.maths),
        layout.gather(turn.grads[piece], variant.maths),
        dict(zip(PER_TENSOR, numbers.unbind(), strict=True)),
        {key: factor[piece] for key, factor in turn.factors.items()},
        _Blocks(layout, seeds, variant.maths),
    )
    shapes = [param.shape for param in params]
    torch._foreach_copy_(params, layout.split(new_p, shapes))
    for slot in variant.slots:
        if slot.name not in after:
            continue
        value = after[slot.name]
        parts = list(value.unbind()) if slot.kind == "scalar" else layout.split(value, shapes)
        torch._foreach_copy_([entry[slot.name] for entry in entries], parts)
        if slot.coded:
            parts = list(layout.split_blocks(after[slot.scale].squeeze(1)))
            torch._foreach_copy_([entry[slot.scale] for entry in entries], parts)
    return report
