"""The model's layers under their names in files, and which of them a selection reaches.

Names are stock's whatever the installed libraries call their modules: `lora_unet_` and the UNet's
path with underscores, `lora_te_text_model_…` for a lone text encoder, `lora_te1_…` and `lora_te2_…`
for SDXL's two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from networks.presets import Selection

TextEncoders = nn.Module | Sequence[nn.Module] | None

UNET_PREFIX = "lora_unet"
TEXT_PREFIX = "lora_te"


class StockPaths(nn.Module):
    """A text encoder whose module paths start with `text_model.` again.

    transformers 5 dropped that level from CLIPTextModel (and kept it in
    CLIPTextModelWithProjection). Whoever makes names from paths is given this instead.
    """

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = text_encoder


def with_stock_paths(text_encoder: nn.Module) -> nn.Module:
    """The text encoder itself if its paths are stock's, else `StockPaths` around it."""
    children = dict(text_encoder.named_children())
    if "text_model" in children or "encoder" not in children:
        return text_encoder
    return StockPaths(text_encoder)


def as_list(text_encoder: TextEncoders) -> list[nn.Module]:
    """Stock passes one text encoder or a list."""
    if text_encoder is None:
        return []
    return [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder)


def text_prefixes(count: int) -> list[str]:
    """`lora_te` for a lone text encoder, `lora_te1`, `lora_te2`, … for several."""
    return [TEXT_PREFIX] if count == 1 else [f"{TEXT_PREFIX}{i + 1}" for i in range(count)]


def is_sdxl(unet: nn.Module | None) -> bool:
    """SDXL's UNet is the one with size conditioning."""
    return getattr(getattr(unet, "config", None), "addition_embed_type", None) == "text_time"


def named_layers(
    text_encoders: Sequence[nn.Module], unet: nn.Module | None
) -> Iterator[tuple[str, str, nn.Module]]:
    """Every module of the model: its name in files, its path, itself; text encoders first."""
    roots = list(zip(text_prefixes(len(text_encoders)), text_encoders, strict=True))
    for prefix, root in [*roots, *([(UNET_PREFIX, unet)] if unet is not None else [])]:
        for path, module in with_stock_paths(root).named_modules():
            if path:
                yield f"{prefix}_{path}".replace(".", "_"), path, module


def selected_layers(
    selection: Selection, text_encoders: Sequence[nn.Module], unet: nn.Module | None
) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """The modules that `selection` reaches: name in files, itself, and its own settings."""
    class_of: dict[str, str] = {}
    for name, path, module in named_layers(text_encoders, unet):
        root = name.removesuffix("_" + path.replace(".", "_"))
        class_of[f"{root}.{path}"] = module.__class__.__name__
        parts = path.split(".")
        chain = [f"{root}.{'.'.join(parts[: depth + 1])}" for depth in range(len(parts))]
        targets = selection.unet if root == UNET_PREFIX else selection.text_encoder
        config = selection.config(targets, path, [class_of[part] for part in chain])
        if config is not None:
            yield name, module, config


# Inside of a resnet, SDXL's original layout to that of diffusers.
_RESNET_LAYERS = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTER_LAYERS = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_OUTER_BLOCK = re.compile(r"^(input|output)_blocks_(\d+)_(\d+)(?:_(.*))?$")
_MIDDLE_BLOCK = re.compile(r"^middle_block_(\d+)_(.*)$")


def from_original_layout(lora_name: str) -> str:
    """The name in diffusers' layout of a UNet layer named in SDXL's original one, else itself.

    Stock trains SDXL on the original layout, so its files say `lora_unet_input_blocks_4_1_…` where
    diffusers' UNet has `down_blocks_1_attentions_0_…`.
    """
    path = lora_name.removeprefix(UNET_PREFIX + "_")
    if path in _OUTER_LAYERS:
        return f"{UNET_PREFIX}_{_OUTER_LAYERS[path]}"
    if match := _MIDDLE_BLOCK.match(path):
        block, layer = int(match[1]), match[2]
        where = "attentions_0" if block == 1 else f"resnets_{block // 2}"
        return f"{UNET_PREFIX}_mid_block_{where}_{_RESNET_LAYERS.get(layer, layer)}"
    if match := _OUTER_BLOCK.match(path):
        side, block, part, layer = match[1], int(match[2]), match[3], match[4] or ""
        return f"{UNET_PREFIX}_{_in_level(side, block, part, layer)}"
    return lora_name


def _in_level(side: str, block: int, part: str, layer: str) -> str:
    """Three blocks of the original layout make a level: its layers, then its sampler."""
    level, index = divmod(block - 1 if side == "input" else block, 3)
    where = f"{'down' if side == 'input' else 'up'}_blocks_{level}"
    if layer == "op":
        return f"{where}_downsamplers_0_conv"
    if layer == "conv":
        return f"{where}_upsamplers_0_conv"
    if part == "0":
        return f"{where}_resnets_{index}_{_RESNET_LAYERS.get(layer, layer)}"
    return f"{where}_attentions_{index}_{layer}"
