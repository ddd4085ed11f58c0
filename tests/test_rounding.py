"""Stochastic rounding: where its noise comes from, and where it rounds to."""

import pytest
import torch

from library.optim import rounding
from library.optim.layout import BLOCK, layout_of

CPU = torch.device("cpu")


def test_noise_depends_on_key_step_and_draw_alone():
    one = layout_of((700,), CPU)
    two = layout_of((300, 700), CPU)
    keys = torch.tensor([5, 9], dtype=torch.int32)
    alone = next(rounding.uniforms(one.position, one.spread(keys[1:]), 3))
    among = rounding.uniforms(two.position, two.spread(keys), 3)
    draws = [next(among) for _ in range(3)]
    assert torch.equal(draws[0][-3:], alone)
    assert not torch.equal(draws[0][:2], alone[:2])
    later = next(rounding.uniforms(one.position, one.spread(keys[1:]), 4))
    assert not torch.equal(later, alone)
    assert not torch.equal(draws[1], draws[0])
    for draw in draws:
        assert draw.mean().item() == pytest.approx(0.5, abs=0.05)
        assert draw.std().item() == pytest.approx(12**-0.5, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_goes_to_a_neighbour_and_is_unbiased(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, BLOCK, generator=generator) * torch.logspace(-7, 3, 20)[:, None]
    total = torch.zeros_like(x)
    for _ in range(300):
        rounded = rounding.round_to(x, dtype, torch.rand(x.shape, generator=generator))
        total += rounded.float()
    spacing = (torch.finfo(dtype).eps * x.abs()).clamp_min(
        2.0**-24 if dtype == torch.float16 else 0
    )
    assert ((rounded.float() - x).abs() <= spacing).all()
    assert ((total / 300 - x) / spacing).abs().max() < 0.2
    kept = x.to(dtype).float()  # representable: no noise moves it
    assert torch.equal(rounding.round_to(kept, dtype, torch.full_like(x, 0.999)).float(), kept)


def test_float16_does_not_overflow_where_rounding_to_nearest_would_not():
    """Its largest number is 65504; only from 65520 on infinity is nearer."""
    x = torch.tensor([65504, 65510, 65519.9, 1e6, torch.inf, torch.nan])
    x = torch.stack([x, -x])
    for noise in (0.0, 0.9, 0.9999):
        rounded = rounding.round_to(x, torch.float16, torch.full_like(x, noise))
        assert (rounded[:, :3].abs() == 65504).all()
        assert torch.equal(rounded[:, :3].sign(), x[:, :3].sign())
        assert not rounded[:, 3:].isfinite().any()
