"""Optimizer state in 8 bits: one code per element, one float32 scale per block of 256.

A code is the head of a small float32 number. A value's magnitude, divided by the block's largest,
lies between 0 and 1; a `floor` is added, and of the float32 that this makes the exponent and three
bits behind it are kept. So codes lie evenly below the floor and an eighth of an octave apart above
it, and encoding is an addition and a shift:

- signed (m):    a sign and 127 steps, floor 2⁻¹⁶ of the block's largest
- positive (v):  255 steps, floor 2⁻³²: for √v, too, 2⁻¹⁶; also for sums over rows and columns

The elements of a block may differ in their gradients by four orders of magnitude (rows of LoRA over
channels with large activations do), so range is worth more than steps; rounding errors are averaged
away by the moments themselves.

Rounding is stochastic: noise below the bits that are kept is added and then cut off. It is unbiased
in the value, because codes are even within an octave. With β₂ = 0.999 a step changes v by a
thousandth, far less than one code: rounded to the nearest, v would stand still.
A positive value never becomes zero: a zero v would turn into a division by eps.

The functions here run on tensors and are translated to C++ with the rest of the chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .lines import Axis

Kind = Literal[
    "signed", "positive", "row", "column", "whole", "byte", "packed", "scalar", "initial"
]
"""What a technique keeps of a parameter: a signed or a positive value for each element, a positive
one for each row or column (these may be held in 8 bits); a whole number for each element in 16
bits, in eight or packed into ten; one float64 for the tensor; or the parameter's own initial
value."""

KINDS: tuple[Kind, ...] = get_args(Kind)
QUANTIZABLE: tuple[Kind, ...] = ("signed", "positive", "row", "column")
CODES: dict[Kind, torch.dtype] = {
    "signed": torch.int8,
    "positive": torch.uint8,
    "row": torch.uint8,
    "column": torch.uint8,
}
FIXED: tuple[Kind, ...] = ("byte", "packed", "initial")
"""Kinds that a step reads and never writes."""


def axis_of(kind: Kind) -> Axis | None:
    """What there is a number of: each row or column, or each element."""
    return kind if kind == "row" or kind == "column" else None


_TINY = torch.finfo(torch.float32).tiny


_CUT = 20  # of float32's 23 bits behind the exponent three are kept


class _Code(NamedTuple):
    """How a kind is coded: the floor, as a power of two."""

    octaves: int

    @property
    def floor(self) -> float:
        return 2.0**-self.octaves

    @property
    def base(self) -> int:
        """The bits of the floor as float32."""
        return (127 - self.octaves) << 23

    @property
    def span(self) -> float:
        """What the last code stands for, without the floor."""
        return 0.9375 - self.floor


_POSITIVE = _Code(32)
_CODE: dict[Kind, _Code] = {
    "signed": _Code(16),
    "positive": _POSITIVE,
    "row": _POSITIVE,
    "column": _POSITIVE,
}

NEAREST = 1 << 19
"""The noise that rounds to the nearest code."""


def block_maxima(matrix: Tensor) -> Tensor:
    """The largest number of each block, `[blocks, 1]`."""
    return matrix.amax(1, keepdim=True)


def encode(
    x: Tensor,
    kind: Kind,
    noise: Tensor | int,
    largest: Callable[[Tensor], Tensor] = block_maxima,
) -> tuple[Tensor, Tensor]:
    """8-bit codes and scales of `x`.

    Args:
        x: float32 `[blocks, 256]`.
        kind: one of `QUANTIZABLE`.
        noise: int32 of 20 bits for stochastic rounding; their half rounds to the nearest.
        largest: gives the largest value of each block.

    Returns:
        codes `[blocks, 256]` (int32, to be stored as int8 or uint8) and scales `[blocks, 1]`.
    """
    code = _CODE[kind]
    size = x.abs() if kind == "signed" else x
    scale = largest(size) / code.span
    floored = (size * (1 / scale.clamp_min(_TINY)) + code.floor).to(torch.float32)
    steps = ((floored.view(torch.int32) + noise) >> _CUT) - (code.base >> _CUT)
    if kind == "signed":
        return torch.where(x < 0, -steps, steps), scale
    return steps.clamp_min(1), scale


def pack_high(values: Tensor) -> Tensor:
    """Bits 8 and 9 of whole numbers below 1024, four numbers to a byte.

    Args:
        values: int32 `[blocks, 256]`.

    Returns:
        uint8 `[blocks, 64]`; byte k has those of the elements k, 64 + k, 128 + k and 192 + k.
    """
    quarters = (values >> 8).view(-1, 4, 64)
    shifts = torch.arange(0, 8, 2, device=values.device).view(4, 1)
    return (quarters << shifts).sum(1).to(torch.uint8)


def unpack_high(high: Tensor) -> Tensor:
    """What `pack_high` was given, without the lower eight bits: int32 `[blocks, 256]`, 0 to 3."""
    shifts = torch.arange(0, 8, 2, device=high.device, dtype=torch.int32).view(4, 1)
    return ((high.to(torch.int32).unsqueeze(1) >> shifts) & 3).view(-1, 256)


def decode(codes: Tensor, scale: Tensor, kind: Kind) -> Tensor:
    """The float32 values `[blocks, 256]` of codes (int32) and scales made by `encode`."""
    code = _CODE[kind]
    size = codes.abs() if kind == "signed" else codes
    floored = ((size << _CUT) + code.base).view(torch.float32)
    value = floored * scale - code.floor * scale
    # The sign of an int32 is where that of a float32 is.
    return torch.copysign(value, codes.view(torch.float32)) if kind == "signed" else value
