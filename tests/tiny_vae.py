"""A stand-in for the model where only its VAE matters: a real one, tiny, built from config."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from library.training.errors import UserError


class TinyVae:
    """4×4 pixels to a latent cell, 4 channels, seeded weights."""

    vae_factor = 4

    def __init__(self, seed: int = 0) -> None:
        self.vae_key = f"tiny-{seed}"
        self.encoded = 0  # pictures so far
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(4, 4, 8),
                layers_per_block=1,
                norm_num_groups=4,
            ).eval()

    @torch.no_grad()
    def encode_images(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        self.encoded += len(images)
        distribution = self.vae.encode(images).latent_dist
        noise = torch.stack(
            [
                torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
                for mean, seed in zip(distribution.mean, seeds, strict=True)
            ]
        )
        latents = (distribution.mean + distribution.std * noise) * 0.18215
        if not latents.isfinite().all():
            raise UserError("not finite")
        return latents
