"""What few bits must not change: decay of bfloat16 parameters, and where 8-bit state leads to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import NOTHING_ON, each_backend, hina, parameters
from torch import Tensor

SWITCHES: dict[str, dict[str, Any]] = {
    "nothing on": NOTHING_ON,
    "defaults without names": {"use_alora": False, "dynamic_weight_decay": False},
}
pytestmark = pytest.mark.slow
each_switches = pytest.mark.parametrize("switches", SWITCHES.values(), ids=list(SWITCHES))


@pytest.mark.parametrize(
    ("backend", "switches"),
    [("compiled", "nothing on"), ("compiled", "defaults without names"), ("eager", "nothing on")],
)
def test_bfloat16_decays_as_float32(backend, switches):
    """lr·wd = 1e-5 of a parameter is a few hundredths of the distance to the next bfloat16.

    Rounded to the nearest nothing happens, ever. Rounded stochastically, some 4 of 2,000 steps move
    an element down by one such distance, so that the sum over 8,192 elements is known to 0.6 % of
    the way: 2 % is more than three standard deviations.
    """
    start = torch.linspace(0.5, 2.0, 8192).bfloat16()
    wide, stochastic, nearest = parameters(start[::32].float(), start, start)
    common = {"lr": 1e-3, "weight_decay": 0.01, **SWITCHES[switches]}
    optimizer = hina([("stochastic", stochastic), ("wide", wide)], backend, **common)
    rounding = hina([("nearest", nearest)], backend, bf16_rounding="nearest", **common)
    for p in (wide, stochastic, nearest):
        p.grad = torch.zeros_like(p)
    for step in range(2000):
        optimizer.step()
        if step < 100:  # that nothing has happened is plain by then
            rounding.step()
    float32, bfloat16 = (
        1 - (p.detach().double().sum() / before.double().sum()).item()
        for p, before in ((wide, start[::32]), (stochastic, start))
    )
    assert float32 == pytest.approx(1 - (1 - 1e-5) ** 2000, rel=2e-3)
    assert bfloat16 == pytest.approx(float32, rel=0.02)
    assert torch.equal(nearest, start)


def rosenbrock_gradient(points: Tensor) -> Tensor:
    """Of (1−x)² + 100·(y−x²)², for `[2, copies]`: x, then y."""
    x, y = points
    return torch.stack((-400 * x * (y - x * x) - 2 * (1 - x), 200 * (y - x * x)))


def minimise(
    backend: str, start: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, **options: Any
) -> Tensor:
    """Where a cosine schedule ends."""
    (p,) = parameters(start)
    common = {"weight_decay": 0.0, "betas": (0.9, 0.99)}
    optimizer = hina([("x.weight", p)], backend, **common, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        p.grad = gradient(p.detach())
        optimizer.step()
        schedule.step()
    return p.detach()


def rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


@each_backend
@each_switches
def test_eight_bits_find_the_minimum_of_a_badly_conditioned_quadratic(backend, switches):
    """Curvatures of 0.01 to 100 within every block of state: the codes have to hold gradients of
    four orders of magnitude and second moments of eight at once. From a distance of 0.58, 8-bit
    state ends within 1e-4 of the minimum, and so of where float32 state ends."""
    generator = torch.Generator().manual_seed(0)
    target = torch.empty(64, 64).uniform_(-1, 1, generator=generator)
    curvature = torch.logspace(-2, 2, 64)
    ends = {
        bits: minimise(
            backend,
            torch.zeros(64, 64),
            lambda p: curvature * (p - target),
            steps=600,
            lr=0.05,
            optim_bits=bits,
            **switches,
        )
        for bits in (8, 32)
    }
    assert rms(target) > 0.5
    assert rms(ends[32] - target) < 1e-4
    assert rms(ends[8] - target) < 1e-4
    assert not torch.equal(ends[8], ends[32])


@each_backend
@each_switches
def test_eight_bits_find_the_minimum_of_rosenbrock(backend, switches):
    """2,048 copies from around the classic start (−1.2, 1), 1.6 (root mean square) from the minimum
    at (1, 1): both end within 5e-3 of it."""
    generator = torch.Generator().manual_seed(0)
    jitter = torch.empty(2, 2048).uniform_(-0.2, 0.2, generator=generator)
    start = torch.tensor([[-1.2], [1.0]]) + jitter
    ends = {
        bits: minimise(
            backend, start, rosenbrock_gradient, steps=2000, lr=0.2, optim_bits=bits, **switches
        )
        for bits in (8, 32)
    }
    assert rms(start - 1) > 1.5
    assert rms(ends[32] - 1) < 5e-3
    assert rms(ends[8] - 1) < 5e-3
    assert not torch.equal(ends[8], ends[32])
