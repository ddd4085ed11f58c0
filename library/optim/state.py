"""Optimizer state in 8 bits: one code per element, one float32 scale per block of 256.

A block is scaled by its largest magnitude. The codes are spaced by a power law rather than evenly,
because within a block the moments span several orders of magnitude:

- signed (m):    m = scale · sign(c) · (c/127)²,   c in −127 … 127
- positive (v):  v = scale · (c/255)⁴,             c in 0 … 255, so √v has the spacing (c/255)²

Rounding is stochastic and unbiased in the value, not in the code. With β₂ = 0.999 a step changes v
by a thousandth, far less than one code: rounded to the nearest, v would stand still.
A positive value never becomes zero: a zero v would turn into a division by eps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["signed", "positive", "scalar", "initial"]
"""What a technique keeps of a parameter: a signed or a positive value for each element (these may
be held in 8 bits), one float32 for the tensor, or the parameter's own initial value."""

QUANTIZABLE: tuple[Kind, ...] = ("signed", "positive")

_TINY = torch.finfo(torch.float32).tiny
_NEAREST = 0.5


def encode(x: Tensor, kind: Kind, noise: Tensor | float = _NEAREST) -> tuple[Tensor, Tensor]:
    """8-bit codes and scales of `x`.

    Args:
        x: float32 `[blocks, 256]`.
        kind: `signed` or `positive`.
        noise: uniform in [0, 1) for stochastic rounding; 0.5 rounds to the nearest value.

    Returns:
        codes `[blocks, 256]` (int8 or uint8) and scales `[blocks]` (float32).
    """
    ratio = x.abs()
    scale = ratio.amax(1)
    ratio.div_(scale.clamp_min(_TINY).unsqueeze(1))
    if kind == "signed":
        square = ratio.mul_(127.0**2)
        low = square.sqrt().floor_()
        # Between low² and (low+1)², up with the share of the way that is gone.
        up = square.sub_(low * low).div_(2 * low + 1) > noise
        return low.add_(up).copysign_(x).to(torch.int8), scale
    fourth = ratio.mul_(255.0**4)
    low = fourth.sqrt().sqrt_().floor_()
    low4 = (low * low).square_()
    gap = (low + 1).square_().square_().sub_(low4)
    up = fourth.sub_(low4).div_(gap) > noise
    codes = low.add_(up).clamp_max_(255).maximum(x > 0)
    return codes.to(torch.uint8), scale


def decode(codes: Tensor, scale: Tensor, kind: Kind) -> Tensor:
    """The float32 values `[blocks, 256]` of codes and scales made by `encode`."""
    c = codes.float()
    if kind == "signed":
        return c.mul_(c.abs()).mul_((scale / 127.0**2).unsqueeze(1))
    return c.square_().square_().mul_((scale / 255.0**4).unsqueeze(1))
