"""Noise for stochastic rounding, from a counter: the same in every process that knows key and step.

The noise of a block is 256 neighbours in a table of 32,768 evenly spaced numbers in fixed disorder;
where it begins is a hash of the tensor's key, the step, the draw's number and the block's. No
generator has to be saved or kept in step, replicas of a distributed run agree, and the result does
not depend on how tensors are batched. A table instead of a hash for each element: a load instead of
a dozen instructions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TABLE = 1 << 15
BITS = 20
STREAM = 0x85EBCA77  # spaces the draws of a step
SPACING = 0x9E3779B1  # the golden ratio: neighbouring blocks far apart
_MASK32 = 0xFFFFFFFF


def _signed(value: int) -> int:
    """The int32 with the same 32 bits as an unsigned `value`."""
    return (value & _MASK32) - ((value & 0x80000000) << 1)


def scramble(x: Tensor) -> Tensor:
    """Hash an int32 tensor: two multiplications between three xor-shifts, a bijection.

    The constants are those of Wellons' `lowbias32`, found by search for the lowest bias.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(0x7FEB352D)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


@lru_cache(maxsize=8)
def table(device: torch.device) -> Tensor:
    """`[32768 + 256]` int32: evenly spaced numbers of 20 bits in disorder, the first 256 again at
    the end.

    Their mean is 2¹⁹, so that rounding by them is unbiased exactly.
    """
    order = scramble(torch.arange(TABLE, dtype=torch.int32)).argsort()
    numbers = ((2 * order + 1) * ((1 << BITS) // (2 * TABLE))).to(torch.int32)
    return torch.cat([numbers, numbers[:256]]).to(device)


def seeds(keys: Tensor, steps: Tensor) -> Tensor:
    """What stands for each tensor in this step: int32, from its key and its step."""
    return scramble(keys.to(torch.int32) ^ scramble(steps.to(torch.int32)))


def draw(seed: Tensor, block: Tensor, number: int) -> Tensor:
    """The `number`-th noise of this step, int32 `[blocks, 256]` of 20 bits.

    Args:
        seed: int32 `[blocks]`, the seed of each block's tensor.
        block: int32 `[blocks]`, each block's index in its tensor.
    """
    stream = _signed(number * STREAM)
    start = scramble(scramble(seed + stream) ^ (block * _signed(SPACING))) & (TABLE - 1)
    rows = table(seed.device).unfold(0, 256, 1)
    return rows[start]


def round_to(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 `x` to bfloat16 or float16, up or down with the probability of nearness.

    The expected value of the result is `x`; a representable `x` is kept (arXiv 2010.06192, §3).
    Only beyond float16's largest number, 65504, an `x` that is nearer to it than to infinity is
    rounded to it. The result is still float32.

    Args:
        noise: int32 of 20 bits, of the shape of `x`.
    """
    if dtype == torch.bfloat16:
        # bfloat16 is the upper half of float32: noise below, then cut.
        return ((x.view(torch.int32) + (noise >> (BITS - 16))) & -65536).view(torch.float32)
    # float16 has subnormals inside float32's normal range, so the spacing is computed.
    _, exponent = torch.frexp(x)
    spacing = (exponent - 1).clamp_min(-14) - 10
    ulp = ((spacing + 127) << 23).view(torch.float32)
    # Twelve bits of noise: with more a representable x of 2,047 ulps would be carried over.
    rounded = torch.floor(x / ulp + (noise >> (BITS - 12)) * 2.0**-12) * ulp
    finite = x.abs() < 65520
    return torch.where(finite, rounded.clamp(-65504, 65504), rounded)


def round_to_nearest(x: Tensor) -> Tensor:
    """Round float32 `x` to bfloat16's numbers, ties to even; the result is still float32."""
    bits = x.view(torch.int32)
    return ((bits + (32767 + ((bits >> 16) & 1))) & -65536).view(torch.float32)
