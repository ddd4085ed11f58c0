"""Stochastic rounding from a counter: the same noise in every process that knows key and step.

The random bits are a hash of the tensor's key, the step, the draw's number and the element's index.
No generator has to be saved or kept in step, replicas of a distributed run agree, and the result
does not depend on how tensors are batched.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _signed(value: int) -> int:
    """The int32 with the same 32 bits as an unsigned `value`."""
    return (value & _MASK32) - ((value & 0x80000000) << 1)


def _scramble_(x: Tensor) -> Tensor:
    """Hash an int32 tensor in place: two multiplications between three xor-shifts, a bijection.

    The constants are those of Wellons' `lowbias32`, found by search for the lowest bias.
    """
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x7FEB352D))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def uniforms(position: Tensor, keys: Tensor, step: int) -> Iterator[Tensor]:
    """Uniform float32 noise matrices in [0, 1) without end, each with 16 random bits.

    Args:
        position: int32 index of each element in its tensor.
        keys: int32, broadcastable to `position`: what stands for each tensor.
        step: the step; the same step gives the same noise.
    """
    spaced = position * _signed(0x9E3779B1)  # the golden ratio: neighbours far apart
    for draw in count(step << 4):
        seed = _scramble_(keys ^ _signed(draw * 0x85EBCA77))
        bits = _scramble_(spaced ^ seed)
        yield (bits & 0xFFFF).float().mul_(2.0**-16)
        yield bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF).float().mul_(2.0**-16)


def round_to(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 `x` to bfloat16 or float16, up or down with the probability of nearness.

    The expected value of the result is `x`; a representable `x` is kept (arXiv 2010.06192, §3).
    Only beyond float16's largest number, 65504, an `x` that is nearer to it than to infinity is
    rounded to it.

    Args:
        noise: uniform in [0, 1), of the shape of `x`.
    """
    if dtype == torch.bfloat16:
        # bfloat16 is the upper half of float32: noise below, then cut.
        bits = (noise * 2.0**16).to(torch.int32).add_(x.view(torch.int32))
        return bits.bitwise_and_(~0xFFFF).view(torch.float32).to(dtype)
    # float16 has subnormals inside float32's normal range, so the spacing is computed.
    _, exponent = torch.frexp(x)
    spacing = (exponent - 1).clamp_min(-14) - 10
    ulp = ((spacing + 127) << 23).view(torch.float32)
    rounded = torch.floor(x / ulp + noise) * ulp
    finite = x.abs() < 65520
    return torch.where(finite, rounded.clamp(-65504, 65504), rounded).to(dtype)
