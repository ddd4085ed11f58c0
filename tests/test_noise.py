"""The forward process against its definitions, written out here in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from library.training.noise import (
    NoiseSchedule,
    add_noise,
    draw_noise,
    draw_timesteps,
    target,
)
from library.training.options import Options
from library.training.randomness import derive_seed, python_stream, torch_stream

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule({**SD_BETAS, "num_train_timesteps": 1000, "clip_sample": False})


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(3, 4, 12, 8, generator=torch.Generator().manual_seed(1))


def reference_alphas_cumprod(start: float = 0.00085, end: float = 0.012) -> Tensor:
    """SD's betas: the square roots rise evenly."""
    roots = torch.linspace(math.sqrt(start), math.sqrt(end), 1000, dtype=torch.float64)
    return torch.cumprod(1 - roots**2, dim=0)


def zero_terminal(alphas_cumprod: Tensor) -> Tensor:
    """arXiv 2305.08891: shift √α̅ so that the last is 0, scale so that the first stays."""
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


def test_schedule_of_stable_diffusion(schedule: NoiseSchedule) -> None:
    reference = reference_alphas_cumprod()
    assert schedule.num_timesteps == 1000
    torch.testing.assert_close(schedule.alphas_cumprod.double(), reference, rtol=1e-4, atol=0)
    steps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        schedule.snr(steps).double(), (reference / (1 - reference))[steps], rtol=2e-4, atol=0
    )


def test_zero_terminal_snr_removes_all_signal_but_leaves_the_loss_weights() -> None:
    plain = NoiseSchedule(SD_BETAS)
    rescaled = NoiseSchedule(SD_BETAS, zero_terminal_snr=True)
    reference = zero_terminal(reference_alphas_cumprod())
    assert rescaled.alphas_cumprod[-1] == 0
    torch.testing.assert_close(rescaled.alphas_cumprod.double(), reference, rtol=2e-3, atol=1e-7)
    steps = torch.arange(1000)
    assert torch.equal(rescaled.snr(steps), plain.snr(steps))


def test_linear_betas_are_those_of_the_model() -> None:
    config = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(
        NoiseSchedule(config).alphas_cumprod.double(),
        torch.cumprod(1 - betas, dim=0),
        rtol=1e-4,
        atol=0,
    )


def test_noisy_latents_and_targets(schedule: NoiseSchedule, latents: Tensor) -> None:
    noise = torch.randn_like(latents)
    steps = torch.tensor([0, 499, 999])
    alphas_cumprod = reference_alphas_cumprod()[steps].reshape(-1, 1, 1, 1)
    signal, spread = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    x, eps = latents.double(), noise.double()

    noisy = add_noise(schedule, latents, noise, steps, [1, 2, 3], Options())
    torch.testing.assert_close(noisy.double(), signal * x + spread * eps, rtol=1e-4, atol=1e-5)
    assert target(schedule, latents, noise, steps, "epsilon") is noise
    velocity = target(schedule, latents, noise, steps, "v_prediction")
    torch.testing.assert_close(velocity.double(), signal * eps - spread * x, rtol=1e-4, atol=1e-5)


def test_a_sample_has_the_same_noise_whatever_its_batch(latents: Tensor) -> None:
    options = Options(
        noise_offset=0.1,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.05,
        multires_noise_iterations=4,
    )
    together = draw_noise(latents, [7, 8, 9], options)
    alone = draw_noise(latents[1:2], [8], options)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


def test_noise_is_standard_normal_of_the_sample_stream(latents: Tensor) -> None:
    noise = draw_noise(latents, [7, 8, 9], Options())
    expected = torch.randn(latents.shape[1:], generator=torch_stream(8, "noise"))
    assert torch.equal(noise[1], expected)
    assert noise.shape == latents.shape
    assert noise.dtype == latents.dtype


def offset_between(with_offset: Tensor, latents: Tensor, seeds: list[int]) -> Tensor:
    """What was added to the plain noise, checked to be one number a channel: [B, C]."""
    added = with_offset - draw_noise(latents, seeds, Options())
    flat = added.flatten(2)
    torch.testing.assert_close(flat, flat[..., :1].expand_as(flat), rtol=0, atol=1e-5)
    return flat.mean(dim=2)


def test_noise_offset_adds_one_number_a_channel() -> None:
    latents = torch.zeros(500, 4, 4, 4)
    seeds = list(range(500))
    added = offset_between(draw_noise(latents, seeds, Options(noise_offset=0.3)), latents, seeds)
    assert added.std().item() == pytest.approx(0.3, rel=0.06)
    assert abs(added.mean().item()) < 0.03


def test_noise_offset_of_random_strength() -> None:
    latents = torch.zeros(400, 4, 2, 2)
    seeds = list(range(400))
    fixed = Options(noise_offset=0.3)
    varied = Options(noise_offset=0.3, noise_offset_random_strength=True)
    full = offset_between(draw_noise(latents, seeds, fixed), latents, seeds)
    some = offset_between(draw_noise(latents, seeds, varied), latents, seeds)
    share = some / full
    torch.testing.assert_close(share, share[:, :1].expand_as(share), rtol=1e-2, atol=1e-2)
    assert 0 <= share.min() < 0.1
    assert 0.9 < share.max() <= 1
    assert share[:, 0].mean().item() == pytest.approx(0.5, abs=0.06)


def test_adaptive_noise_scale_grows_with_the_channel_mean(latents: Tensor) -> None:
    seeds = [1, 2, 3]
    shifted = latents + torch.tensor([0.0, 1.0, -2.0, 4.0]).reshape(1, 4, 1, 1)
    base = offset_between(draw_noise(shifted, seeds, Options(noise_offset=0.1)), shifted, seeds)
    for scale in (0.5, -0.04):
        options = Options(noise_offset=0.1, adaptive_noise_scale=scale)
        added = offset_between(draw_noise(shifted, seeds, options), shifted, seeds)
        strength = (0.1 + scale * shifted.mean(dim=(2, 3)).abs()).clamp(min=0)
        torch.testing.assert_close(added, base / 0.1 * strength, rtol=1e-3, atol=1e-4)


def reference_pyramid(noise: Tensor, seed: int, iterations: int, discount: float) -> Tensor:
    """Whitaker's multi-resolution noise for one sample, [C, H, W]."""
    channels, height, width = noise.shape
    ratios, stream = python_stream(seed, "multires ratio"), torch_stream(seed, "multires noise")
    total = noise.double()
    for level in range(iterations):
        shrink = (2 + 2 * ratios.random()) ** level
        h, w = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = torch.randn(1, channels, h, w, generator=stream).double()
        up = torch.nn.Upsample(size=(height, width), mode="bilinear")
        total = total + up(coarse)[0] * discount**level
        if h == 1 or w == 1:
            break
    return total / total.std()


def test_multires_noise(latents: Tensor) -> None:
    options = Options(multires_noise_iterations=6, multires_noise_discount=0.4)
    plain = draw_noise(latents, [4, 5, 6], Options())
    noise = draw_noise(latents, [4, 5, 6], options)
    for index, seed in enumerate([4, 5, 6]):
        expected = reference_pyramid(plain[index], seed, 6, 0.4)
        torch.testing.assert_close(noise[index].double(), expected, rtol=1e-4, atol=1e-5)
        assert noise[index].std().item() == pytest.approx(1)


def test_input_perturbation_changes_the_input_only(
    schedule: NoiseSchedule, latents: Tensor
) -> None:
    seeds, steps = [1, 2, 3], torch.tensor([100, 500, 900])
    noise = draw_noise(latents, seeds, Options())
    plain = add_noise(schedule, latents, noise, steps, seeds, Options())
    noisy = add_noise(schedule, latents, noise, steps, seeds, Options(ip_noise_gamma=0.2))
    spread = (1 - schedule.alphas_cumprod[steps]).sqrt().reshape(-1, 1, 1, 1)
    added = (noisy - plain) / spread
    expected = 0.2 * torch.randn(latents.shape[1:], generator=torch_stream(2, "ip noise"))
    torch.testing.assert_close(added[1], expected, rtol=1e-3, atol=1e-4)
    options = Options(ip_noise_gamma=0.2, ip_noise_gamma_random_strength=True)
    varied = (add_noise(schedule, latents, noise, steps, seeds, options) - plain) / spread
    share = varied.std(dim=(1, 2, 3)) / added.std(dim=(1, 2, 3))
    assert (share > 0).all()
    assert (share < 1).all()
    assert len(set(share.tolist())) == 3


@pytest.mark.parametrize(
    ("bounds", "first", "last"),
    [((None, None), 0, 999), ((200, 300), 200, 299), ((None, 5), 0, 4), ((990, None), 990, 999)],
)
def test_timesteps_cover_their_range(
    schedule: NoiseSchedule, bounds: tuple[int | None, int | None], first: int, last: int
) -> None:
    options = Options(min_timestep=bounds[0], max_timestep=bounds[1])
    seeds = [derive_seed(0, index) for index in range(6000)]
    steps = draw_timesteps(seeds, schedule, options)
    assert steps.dtype == torch.int64
    assert steps.min() <= first + (last - first) // 100
    assert steps.min() >= first
    assert steps.max() <= last
    assert steps.max() >= last - (last - first) // 100
    assert steps.double().mean().item() == pytest.approx((first + last) / 2, rel=0.03)
    assert torch.equal(draw_timesteps(seeds[5:6], schedule, options), steps[5:6])


def test_equal_bounds_give_that_timestep(schedule: NoiseSchedule) -> None:
    options = Options(min_timestep=500, max_timestep=500)
    assert draw_timesteps([1, 2], schedule, options).tolist() == [500, 500]


def test_global_randomness_takes_no_part(latents: Tensor) -> None:
    options = Options(multires_noise_iterations=3, noise_offset=0.1)
    torch.manual_seed(1)
    random.seed(1)
    first = draw_noise(latents, [1, 2, 3], options)
    torch.manual_seed(2)
    random.seed(2)
    assert torch.equal(first, draw_noise(latents, [1, 2, 3], options))
