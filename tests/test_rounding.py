"""Stochastic rounding: where its noise comes from, and where it rounds to."""

import pytest
import torch
from torch import Tensor

from library.optim import noise
from library.optim.layout import BLOCK, layout_of

CPU = torch.device("cpu")


def draws(sizes: tuple[int, ...], keys: list[int], step: int, count: int = 1) -> list[Tensor]:
    """The first noise matrices of a step for tensors of these sizes, between 0 and 1."""
    layout = layout_of(sizes, CPU)
    seeds = noise.seeds(torch.tensor(keys), torch.full((len(keys),), step))
    own = seeds[layout.owner]
    return [noise.draw(own, layout.block, number) / 2**20 for number in range(count)]


def test_noise_depends_on_key_step_and_draw_alone():
    (alone,) = draws((700,), [9], 3)
    among = draws((300, 700), [5, 9], 3, 3)
    assert torch.equal(among[0][-3:], alone)
    assert not torch.equal(among[0][:2], alone[:2])
    assert not torch.equal(draws((700,), [9], 4)[0], alone)
    assert not torch.equal(among[1], among[0])


def test_noise_is_uniform_and_does_not_repeat_itself():
    over_blocks = draws((BLOCK * 4000,), [1], 7)[0]
    over_steps = torch.stack([draws((BLOCK,), [1], step)[0][0] for step in range(4000)])
    for some in (over_blocks, over_steps):
        # Of a uniform variable: mean 1/2, deviation 1/√12, and a tenth of it in each tenth.
        assert some.mean().item() == pytest.approx(0.5, abs=0.002)
        assert some.std().item() == pytest.approx(12**-0.5, abs=0.002)
        tenths = some.flatten().histc(10, 0, 1) / some.numel()
        assert (tenths - 0.1).abs().max() < 0.003
        # An element's noise tells nothing about the same element's in the next block or step.
        centred = some - 0.5
        assert (centred[1:] * centred[:-1]).mean().abs() < 12**-1 * 0.01
        assert (centred.mean(0).abs() < 5 * (12 * 4000) ** -0.5).all()


def test_noise_table_is_even():
    numbers = noise.table(CPU)[: noise.TABLE]
    assert torch.equal(numbers.sort().values, torch.arange(16, 2**20, 32))
    assert torch.equal(noise.table(CPU)[noise.TABLE :], numbers[:BLOCK])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_goes_to_a_neighbour_and_is_unbiased(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, BLOCK, generator=generator) * torch.logspace(-7, 3, 20)[:, None]
    total = torch.zeros_like(x)
    for _ in range(300):
        some = torch.randint(2**20, x.shape, generator=generator, dtype=torch.int32)
        rounded = noise.round_to(x, dtype, some)
        assert torch.equal(rounded.to(dtype).float(), rounded)
        total += rounded
    spacing = (torch.finfo(dtype).eps * x.abs()).clamp_min(
        2.0**-24 if dtype == torch.float16 else 0
    )
    assert ((rounded - x).abs() <= spacing).all()
    assert ((total / 300 - x) / spacing).abs().max() < 0.2
    kept = x.to(dtype).float()  # representable: no noise moves it
    assert torch.equal(noise.round_to(kept, dtype, torch.full_like(some, 2**20 - 1)), kept)


def test_rounding_to_the_nearest_bfloat16_is_torchs():
    x = torch.randn(20, BLOCK) * torch.logspace(-7, 3, 20)[:, None]
    x[0, :2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # ties
    assert torch.equal(noise.round_to_nearest(x), x.bfloat16().float())


def test_float16_does_not_overflow_where_rounding_to_nearest_would_not():
    """Its largest number is 65504; only from 65520 on infinity is nearer."""
    x = torch.tensor([65504, 65510, 65519.9, 1e6, torch.inf, torch.nan])
    x = torch.stack([x, -x])
    for some in (0, 2**19, 2**20 - 1):
        rounded = noise.round_to(x, torch.float16, torch.full(x.shape, some)).to(torch.float16)
        assert (rounded[:, :3].abs() == 65504).all()
        assert torch.equal(rounded[:, :3].sign(), x[:, :3].sign())
        assert not rounded[:, 3:].isfinite().any()
