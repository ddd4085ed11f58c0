"""The base model: UNet, VAE, text encoders and tokenizers of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from library.training.errors import UserError
from library.training.model_files import (
    Kind,
    ModelSource,
    check_kind,
    check_model_path,
    find_model,
    kind_of_folder,
)
from library.training.model_loading import (
    Parts,
    Precision,
    download,
    load_file,
    load_folder,
    load_vae,
    quietly,
)
from library.training.noise import PredictionType
from library.training.options import Options
from library.training.randomness import torch_stream

if TYPE_CHECKING:
    from library.training.data import Batch
    from library.training.text import TextEmbeddings

__all__ = ["DiffusionModel", "Kind", "check_model_path", "load_model"]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class DiffusionModel:
    """The frozen base model in evaluation mode. An adapter hooks into its modules."""

    kind: Kind
    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    text_encoders: list[Any]  # CLIPTextModel, in SDXL then CLIPTextModelWithProjection
    tokenizers: list[Any]  # CLIPTokenizer, one a text encoder
    scheduler_config: dict[str, Any]
    prediction_type: PredictionType

    @property
    def vae_factor(self) -> int:
        """Pixels per side of a latent cell."""
        factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return factor

    @cached_property
    def vae_key(self) -> str:
        """What the latents of a picture depend on: the encoder's weights, precision and scaling.

        A hash of 32 hex digits; VAEs that differ in the decoder only share it.
        """
        config = self.vae.config
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.vae.dtype} {config.scaling_factor} {config.shift_factor}".encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            if not name.startswith(("decoder.", "post_quant_conv.")):
                digest.update(f"{name} {list(tensor.shape)}".encode())
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(data.numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def encode_images(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Scaled latents [B, C, H/f, W/f], float32, of images [B, 3, H, W] in [-1, 1].

        Each is drawn from its posterior with noise from its own seed's stream. UserError where the
        VAE overflows.
        """
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        noise = [torch.randn(mean.shape[1:], generator=torch_stream(seed, "vae")) for seed in seeds]
        latents = mean + std * torch.stack(noise).to(mean.device)
        broken = (~torch.isfinite(latents).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if broken:
            raise UserError(
                f"the VAE's latents of picture(s) {broken} of this batch are not finite"
                + ("; add --no_half_vae" if self.vae.dtype == torch.float16 else "")
            )
        config = self.vae.config
        scaled: Tensor = (latents - (config.shift_factor or 0.0)) * config.scaling_factor
        return scaled

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings, batch: Batch
    ) -> Tensor:
        """The UNet's prediction [B, C, h, w] for noisy latents at `timesteps` [B]."""
        dtype = self.unet.dtype
        conditions: dict[str, Tensor] | None = None
        if self.kind == "sdxl":
            assert text.pooled is not None
            sizes = (batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
            conditions = {
                "text_embeds": text.pooled.to(dtype),
                "time_ids": torch.cat(sizes, dim=1).to(noisy.device, dtype),
            }
        prediction: Tensor = self.unet(
            noisy.to(dtype), timesteps, text.context.to(dtype), added_cond_kwargs=conditions
        ).sample
        return prediction

    def pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """A diffusers pipeline over the same modules, without a safety checker."""
        parts: dict[str, Any] = {
            "unet": self.unet,
            "vae": self.vae,
            "text_encoder": self.text_encoders[0],
            "tokenizer": self.tokenizers[0],
            "scheduler": DDIMScheduler.from_config(self.scheduler_config),
        }
        if self.kind == "sdxl":
            return StableDiffusionXLPipeline(
                **parts,
                text_encoder_2=self.text_encoders[1],
                tokenizer_2=self.tokenizers[1],
                add_watermarker=False,
            )
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )


def load_model(
    options: Options, sdxl: bool, dtype: torch.dtype, device: torch.device | str
) -> DiffusionModel:
    """Load what `--pretrained_model_name_or_path` names, frozen, on `device`.

    `dtype` is that of UNet and text encoders; the VAE keeps float32 with `--no_half_vae`. Attention
    is PyTorch's own (`scaled_dot_product_attention`), the default of diffusers and transformers.
    UserError where there is no such model or it isn't one for this script and these options.
    """
    source = find_model(options)
    precision = Precision(dtype, torch.float32 if options.no_half_vae else dtype)
    with quietly():
        parts, kind = _load_parts(source, options, sdxl, precision)
        if options.vae:
            parts.vae = load_vae(options.vae, parts.configs, precision.vae)
    _check_clip_skip(parts, kind, options)
    model = DiffusionModel(
        kind,
        parts.unet,
        parts.vae,
        parts.text_encoders,
        parts.tokenizers,
        parts.scheduler_config,
        _prediction_type(source, parts, options),
    )
    model.scheduler_config["prediction_type"] = model.prediction_type
    for part in (model.unet, model.vae, *model.text_encoders):
        part.requires_grad_(False).eval().to(device)
    return model


def _load_parts(
    source: ModelSource, options: Options, sdxl: bool, precision: Precision
) -> tuple[Parts, Kind]:
    if source.kind is not None:
        check_kind(source, source.kind, sdxl, options.v2)
    if source.form == "file":
        map_file = not options.disable_mmap_load_safetensors
        parts, kind = load_file(source.path, map_file, precision)
        check_kind(source, kind, sdxl, options.v2)  # a pickle tells only now
        return parts, kind
    folder = download(source.name) if source.form == "hub" else source.path
    kind = source.kind or kind_of_folder(folder)
    check_kind(source, kind, sdxl, options.v2)
    return load_folder(Path(folder), kind, precision), kind


def _prediction_type(source: ModelSource, parts: Parts, options: Options) -> PredictionType:
    """`--v_parameterization` decides, as in stock; the model's own word is held against it."""
    chosen: PredictionType = "v_prediction" if options.v_parameterization else "epsilon"
    own = parts.scheduler_config.get("prediction_type", chosen)
    if own != chosen:
        change = "add" if own == "v_prediction" else "leave out"
        log.warning(
            "%s says of itself that it predicts %s, and it is trained as one that predicts %s: "
            "%s --v_parameterization unless you know better",
            *(source.name, own, chosen, change),
        )
    if parts.scheduler_config.get("rescale_betas_zero_snr") and not options.zero_terminal_snr:
        log.warning("%s was made with zero terminal SNR: add --zero_terminal_snr", source.name)
    return chosen


def _check_clip_skip(parts: Parts, kind: Kind, options: Options) -> None:
    if options.clip_skip is None or kind == "sdxl":  # SDXL always takes the last layer but one
        return
    layers = parts.text_encoders[0].config.num_hidden_layers
    if not 1 <= options.clip_skip <= layers:
        raise UserError(
            f"--clip_skip {options.clip_skip}: the text encoder has {layers} layers, 1 to {layers} "
            "can be asked for"
        )
