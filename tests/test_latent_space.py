"""Telling latents from pictures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from library.latent_space import detect_latent_space


def noise(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(0))


def picture(channels: int, low: float, high: float) -> torch.Tensor:
    stream = torch.Generator().manual_seed(0)
    return low + (high - low) * torch.rand(2, channels, 16, 16, generator=stream)


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1), (0, 255), (-1.02, 1.03)])
@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_pictures(channels: int, low: float, high: float) -> None:
    assert not detect_latent_space(picture(channels, low, high))
    assert not detect_latent_space(picture(channels, low, high)[0])


def test_three_channels_beyond_all_picture_ranges_are_latents() -> None:
    assert detect_latent_space(noise(3) * 3)


def test_four_channels_are_latents_unless_they_look_like_transparency() -> None:
    assert detect_latent_space(noise(4))
    assert detect_latent_space(noise(4) * 0.1)
    assert not detect_latent_space(picture(4, 0, 1))


@pytest.mark.parametrize("channels", [8, 16, 32])
def test_many_channels_are_latents(channels: int) -> None:
    assert detect_latent_space(picture(channels, -1, 1))


def test_the_vae_in_use_rules_other_channel_counts_out() -> None:
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
    assert detect_latent_space(noise(4), vae)
    assert not detect_latent_space(noise(3) * 3, vae)
    assert not detect_latent_space(noise(16), vae)
    assert detect_latent_space(noise(16), channels=16)
    assert not detect_latent_space(noise(4), vae, channels=16)


def test_a_vae_of_three_latent_channels_leaves_it_to_the_values() -> None:
    assert detect_latent_space(noise(3) * 3, channels=3)
    assert not detect_latent_space(picture(3, -1, 1), channels=3)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        detect_latent_space(torch.zeros(4, 4))
