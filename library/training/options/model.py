"""Options about what is trained: the base model and the adapter."""

# ruff: noqa: RUF009 (`option` makes a field, as `dataclasses.field` does)
from __future__ import annotations

from dataclasses import dataclass

from library.training.options.fields import option


@dataclass
class ModelOptions:
    """Base model."""

    pretrained_model_name_or_path: str | None = option(
        None,
        "base model: a diffusers folder, a .safetensors or .ckpt file, or a Hugging Face model id",
        path=True,
    )
    v2: bool = option(False, "the base model is Stable Diffusion 2.x")
    v_parameterization: bool = option(
        False, "the base model predicts v instead of the noise (SD 2.x 768-v and others)"
    )
    vae: str | None = option(
        None, "use this VAE (file or diffusers folder) in place of the base model's", path=True
    )
    no_half_vae: bool = option(False, "keep the VAE in float32 whatever --mixed_precision says")
    clip_skip: int | None = option(
        None, "take the text encoder's n-th layer from the end; 1 is the last", low=1
    )
    max_token_length: int | None = option(
        None,
        "longest caption in tokens; 75 without this option",
        choices=(None, 150, 225),
        explain={75: "75 is what you get without the option: leave it out"},
    )
    tokenizer_cache_dir: str | None = option(
        None, "accepted; tokenizers come with the model or with this program", path=True
    )
    disable_mmap_load_safetensors: bool = option(
        False, "read .safetensors files whole instead of mapping them (faster under WSL)"
    )


@dataclass
class NetworkOptions:
    """Adapter."""

    network_module: str | None = option(
        None, "networks.lora, networks.lokr, networks.loha, networks.kohya or lycoris.kohya"
    )
    network_dim: int | None = option(None, "rank of the adapter", low=1)
    network_alpha: float = option(
        1, "the adapter is scaled by alpha / rank; the rank itself means no scaling", low=0
    )
    network_args: list[str] | None = option(
        None, "further arguments of the network, as key=value (conv_dim=8 algo=lokr factor=8 …)"
    )
    network_dropout: float | None = option(
        None, "share of the adapter's inner values dropped at each step", low=0, high=1
    )
    network_weights: str | None = option(
        None, "start from the weights in this adapter file", path=True
    )
    dim_from_weights: bool = option(
        False, "take rank and alpha from --network_weights instead of --network_dim"
    )
    network_train_unet_only: bool = option(False, "leave the text encoder without an adapter")
    network_train_text_encoder_only: bool = option(False, "leave the UNet without an adapter")
    scale_weight_norms: float | None = option(
        None, "after each step, scale modules down whose weight norm exceeds this (try 1)", low=0
    )
    base_weights: list[str] | None = option(
        None, "adapter files to merge into the base model before training", path=True
    )
    base_weights_multiplier: list[float] | None = option(
        None, "strength of each of --base_weights, in the same order; 1 where none is given"
    )
