"""Optimizer state in 8 bits: near, unbiased, and never at a standstill."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from library.optim import noise
from library.optim.layout import BLOCK
from library.optim.state import CODES, NEAREST, decode, encode

CPU = torch.device("cpu")
# Steps an octave is divided into, and how many octaves lie above the even part.
STEPS, OCTAVES = {"signed": 8, "positive": 8}, {"signed": 16, "positive": 32}


def there_and_back(x: Tensor, kind: str, some: Tensor | int = NEAREST) -> Tensor:
    codes, scale = encode(x, kind, some)
    stored = codes.to(CODES[kind])
    assert torch.equal(stored.to(torch.int32), codes)  # nothing overflows
    return decode(stored.to(torch.int32), scale, kind)


def noise_of(step: int, blocks: int) -> Tensor:
    seeds = noise.seeds(torch.full((blocks,), 7), torch.full((blocks,), step))
    return noise.draw(seeds, torch.arange(blocks, dtype=torch.int32), 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 6), st.sampled_from(["signed", "positive"]))
def test_codes_are_near_and_never_lose_a_positive(seed, spread, kind):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, BLOCK, generator=generator).mul(spread).exp() * 1e-8
    x = x * torch.randn(3, BLOCK, generator=generator).sign() if kind == "signed" else x
    some = torch.randint(2**20, x.shape, generator=generator, dtype=torch.int32)
    back = there_and_back(x, kind, some)
    # Not further than from one code to the next: a share of the value, or of the even part.
    floor = x.abs().amax(1, keepdim=True) * 1.1 * 2.0 ** -OCTAVES[kind]
    assert ((back - x).abs() <= 1.01 * (x.abs() + floor) / STEPS[kind]).all()
    if kind == "positive":
        assert (back > 0).all()
    assert torch.allclose(there_and_back(back, kind), back, rtol=1e-5)


@pytest.mark.parametrize("kind", ["signed", "positive"])
def test_zero_and_the_largest_are_kept(kind):
    x = torch.zeros(2, BLOCK)
    x[1, 3] = 0.7
    back = there_and_back(x, kind, torch.full(x.shape, 2**20 - 1))
    assert not back[0].any()
    assert back[1, 3].item() == pytest.approx(0.7, rel=1e-6)
    assert (there_and_back(x, kind)[1] <= x[1] + 0.7 * 2.0**-19).all()


@pytest.mark.parametrize("kind", ["signed", "positive"])
def test_stochastic_codes_are_unbiased(kind):
    x = torch.rand(4, BLOCK, generator=torch.Generator().manual_seed(0)) ** 4
    total = torch.zeros_like(x)
    for step in range(400):
        total += there_and_back(x, kind, noise_of(step, 4))
    assert (total / 400 - x).mean().abs() < 2e-4
    assert ((total / 400 - x) / (x + 1e-3)).abs().max() < 0.025


def test_a_slow_average_does_not_stand_still():
    """β₂ = 0.999 moves v by less than a code a step: rounded to nearest it would not move."""
    moving = still = torch.ones(10, BLOCK)
    for step in range(1000):
        moving, still = 0.999 * moving, 0.999 * still
        moving[:, 0] = still[:, 0] = 1.0  # keeps the block's scale
        moving = there_and_back(moving, "positive", noise_of(step, 10))
        still = there_and_back(still, "positive")
    assert moving[:, 1:].mean().item() == pytest.approx(0.999**1000, rel=0.05)
    assert still[:, 1:].min() == 1
