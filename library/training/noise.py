"""The forward diffusion process: schedule, timesteps, noise, noisy latents, what to predict.

Every sample draws from streams of its own (`randomness.torch_stream` on its seed), so what happens
to a picture depends neither on its neighbours in the batch nor on the number of processes. Where
stock draws one number for a whole batch (random strengths, the pyramid's ratios, its final scale),
here each sample has its own; at batch size 1 both are the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from library.training.options import Options
from library.training.randomness import python_stream, torch_stream

PredictionType = Literal["epsilon", "v_prediction"]


class NoiseSchedule:
    """How much signal is left at each timestep (DDPM, arXiv 2006.11239, eq. 4).

    `scheduler_config` is that of a diffusers scheduler; its betas are read, nothing else. With
    `zero_terminal_snr` they are rescaled so that the last timestep holds no signal at all
    (arXiv 2305.08891, algorithm 1).
    """

    BETA_FIELDS = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
    )

    def __init__(self, scheduler_config: dict[str, Any], zero_terminal_snr: bool = False) -> None:
        figures = {
            name: scheduler_config[name] for name in self.BETA_FIELDS if name in scheduler_config
        }
        base: Any = DDPMScheduler(**figures)
        used: Any = DDPMScheduler(**figures, rescale_betas_zero_snr=zero_terminal_snr)
        self.alphas_cumprod: Tensor = used.alphas_cumprod
        # Loss weights divide by the signal-to-noise ratio. As in stock they take it from the
        # schedule before it is rescaled: afterwards it is 0 at the last timestep.
        self._snr: Tensor = base.alphas_cumprod / (1 - base.alphas_cumprod)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def snr(self, timesteps: Tensor) -> Tensor:
        """α̅/(1−α̅) of each timestep, [B] float32, as the loss weightings use it."""
        return self._snr.to(timesteps.device)[timesteps]

    def signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√α̅ and √(1−α̅) of each timestep, shaped to multiply `like`, [B, C, H, W]."""
        alphas_cumprod = self.alphas_cumprod.to(like.device)[timesteps.to(like.device)]
        shape = (-1,) + (1,) * (like.ndim - 1)
        signal = alphas_cumprod.sqrt().reshape(shape).to(like.dtype)
        noise = (1 - alphas_cumprod).sqrt().reshape(shape).to(like.dtype)
        return signal, noise


def _normal(shape: Sequence[int], seeds: Sequence[int], key: str) -> Tensor:
    """Standard normal numbers, [len(seeds), *shape] float32 on the CPU, a stream a sample."""
    return torch.stack([torch.randn(shape, generator=torch_stream(seed, key)) for seed in seeds])


def _strength(value: float, random_strength: bool, seeds: Sequence[int], key: str) -> Tensor:
    """`value` for each sample, [B, 1, 1, 1]; with `random_strength` times a number in [0, 1)."""
    factors = [python_stream(seed, key).random() if random_strength else 1.0 for seed in seeds]
    return torch.tensor(factors, dtype=torch.float32).reshape(-1, 1, 1, 1) * value


def _offset(latents: Tensor, seeds: Sequence[int], options: Options) -> Tensor:
    """What noise offset adds: one number a channel (crosslabs.org, "Diffusion with Offset Noise").

    `adaptive_noise_scale` makes it grow with the channel's absolute mean.
    """
    assert options.noise_offset is not None
    strength = _strength(
        options.noise_offset, options.noise_offset_random_strength, seeds, "noise offset strength"
    ).to(latents.device)
    if options.adaptive_noise_scale is not None:
        channel_mean = latents.mean(dim=(2, 3), keepdim=True).abs()
        strength = (strength + options.adaptive_noise_scale * channel_mean).clamp(min=0.0)
    number = _normal((latents.shape[1], 1, 1), seeds, "noise offset").to(latents.device)
    return strength * number


def _pyramid(noise: Tensor, seed: int, iterations: int, discount: float) -> Tensor:
    """One sample's noise [C, H, W] plus ever coarser noise (J. Whitaker, "Multires noise", 2023).

    Each round's resolution is smaller by a power of a ratio drawn from [2, 4) and its weight by a
    power of `discount`; a side of one cell ends it. The sum is scaled to unit variance.
    """
    channels, height, width = noise.shape
    ratios = python_stream(seed, "multires ratio")
    stream = torch_stream(seed, "multires noise")
    for round_ in range(iterations):
        shrink = (2 + 2 * ratios.random()) ** round_
        size = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = torch.randn((1, channels, *size), generator=stream)
        fine = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        noise = noise + fine[0] * discount**round_
        if 1 in size:
            break
    return noise / noise.std()


def draw_noise(latents: Tensor, seeds: Sequence[int], options: Options) -> Tensor:
    """The noise of each sample, of the shape, device and dtype of `latents` [B, C, H, W]."""
    noise = _normal(latents.shape[1:], seeds, "noise").to(latents.device)
    if options.noise_offset:
        noise = noise + _offset(latents.float(), seeds, options)
    if options.multires_noise_iterations:
        iterations, discount = options.multires_noise_iterations, options.multires_noise_discount
        samples = zip(noise.cpu(), seeds, strict=True)
        noise = torch.stack(
            [_pyramid(sample, seed, iterations, discount) for sample, seed in samples]
        )
    return noise.to(latents.device, latents.dtype)


def draw_timesteps(seeds: Sequence[int], schedule: NoiseSchedule, options: Options) -> Tensor:
    """A timestep for each sample, [B] int64 on the CPU, uniform in [min_timestep, max_timestep).

    Both bounds being equal asks for that one timestep.
    """
    first = 0 if options.min_timestep is None else options.min_timestep
    end = schedule.num_timesteps if options.max_timestep is None else options.max_timestep
    if first >= end:
        return torch.full((len(seeds),), end, dtype=torch.int64)
    drawn = [
        torch.randint(first, end, (), generator=torch_stream(seed, "timestep")) for seed in seeds
    ]
    return torch.stack(drawn)


def add_noise(
    schedule: NoiseSchedule,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    seeds: Sequence[int],
    options: Options,
) -> Tensor:
    """√α̅·x + √(1−α̅)·ε, [B, C, H, W].

    With `ip_noise_gamma` the ε mixed in is perturbed, the ε to predict is not (arXiv 2301.11706).
    """
    if options.ip_noise_gamma:
        gamma = _strength(
            options.ip_noise_gamma,
            options.ip_noise_gamma_random_strength,
            seeds,
            "ip noise strength",
        )
        perturbation = gamma * _normal(latents.shape[1:], seeds, "ip noise")
        noise = noise + perturbation.to(noise.device, noise.dtype)
    signal, spread = schedule.signal_and_noise(timesteps, latents)
    return signal * latents + spread * noise


def target(
    schedule: NoiseSchedule,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """What the UNet is to predict: ε, or v = √α̅·ε − √(1−α̅)·x (arXiv 2202.00512, appendix D)."""
    if prediction_type == "epsilon":
        return noise
    signal, spread = schedule.signal_and_noise(timesteps, latents)
    return signal * noise - spread * latents
