"""`--network_module networks.lora`: LoRA on stock's layers, in stock's files."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from networks.build import network_from_weights, new_network
from networks.layers import TextEncoders
from networks.network import AdapterNetwork

MODULE = "networks.lora"


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> AdapterNetwork:
    """A new LoRA network; apply it with `apply_to`.

    Args:
        multiplier: strength, 1 in training.
        network_dim: rank, 4 if None.
        network_alpha: scale times rank, 1 if None; 0 means the rank, that is scale 1.
        text_encoder: one, or a list (SDXL).
        neuron_dropout: as `dropout` among `kwargs`.
        kwargs: `--network_args`; an unknown or useless one is a UserError.
    """
    return new_network(
        MODULE, multiplier, network_dim, network_alpha, text_encoder, unet, neuron_dropout, kwargs
    )


def create_network_from_weights(
    multiplier: float,
    file: str | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """The network that a file (or its tensors) holds, with its weights, and the tensors."""
    return network_from_weights(MODULE, multiplier, file, text_encoder, unet, weights_sd, kwargs)
