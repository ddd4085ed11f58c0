"""Is a tensor a picture or a latent?

Losses made for pictures (the Fourier feature loss) mean nothing on latents, whose channels are no
colours.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

COLOUR_CHANNELS = (1, 3)
# A picture's values: [-1, 1], a little over after interpolation, or never negative up to a byte's.
SIGNED_LIMIT = 1.05
UNSIGNED_LIMIT = 255.0


def detect_latent_space(
    tensor: Tensor, vae: Any | None = None, channels: int | None = None
) -> bool:
    """Whether `tensor`, [B, C, H, W] or [C, H, W], is in a VAE's latent space.

    Give the VAE in use (anything with diffusers' `config.latent_channels`) or the number of
    `channels` of its latents where they are known: a tensor with another number is no latent of
    it. Otherwise 1 or 3 channels may be colours and 4 may be colours with transparency; there the
    values decide: a picture stays in [-1, 1], in 0…1 or in 0…255, and with transparency is never
    negative.
    """
    if tensor.ndim not in (3, 4):
        raise ValueError(f"expected [B, C, H, W] or [C, H, W], not {list(tensor.shape)}")
    if channels is None and vae is not None:
        channels = int(vae.config.latent_channels)
    own = tensor.shape[-3]
    if channels is not None and own != channels:
        return False
    low, high = float(tensor.amin()), float(tensor.amax())
    unsigned = low >= 0.0 and high <= UNSIGNED_LIMIT
    if own in COLOUR_CHANNELS:
        return not (unsigned or (low >= -SIGNED_LIMIT and high <= SIGNED_LIMIT))
    return not unsigned if own == 4 else True
