"""Ranks and learning rates block by block, with stock's numbering of the UNet's blocks.

SD 1.x and 2.x have 25 blocks: 12 down, 1 mid, 12 up. SDXL has 23: the embeddings, 9 down, 3 mid,
9 up, and the output layer. Keys and defaults are stock's (`block_dims`, `down_lr_weight`, …).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.training.errors import UserError

log = logging.getLogger(__name__)

LR_WEIGHT_SHAPES = ("cosine", "sine", "linear", "reverse_linear", "zeros")
NUM_BLOCKS = {"sd": 25, "sdxl": 23}
# How many learning-rate weights down, mid and up take.
LR_WEIGHT_COUNTS = {"sd": (12, 1, 12), "sdxl": (9, 3, 9)}

LR_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")

_LAYER = re.compile(r"^lora_unet_(down|up)_blocks_(\d+)_(resnets|attentions|\w+samplers)_(\d+)_")
_MID_LAYER = re.compile(r"^lora_unet_mid_block_(resnets|attentions)_(\d+)_")


@dataclass
class BlockPlan:
    """One entry a block; rank 0 leaves a block out."""

    sdxl: bool
    dims: list[int] | None = None
    alphas: list[float] | None = None
    conv_dims: list[int] | None = None
    conv_alphas: list[float] | None = None
    lr_weights: list[float] | None = None


def block_index(lora_name: str, sdxl: bool) -> int:
    """Which block a UNet layer belongs to, by its name in files; 0 for the input embeddings.

    In both families a level has its layers first and then its sampler, three places a level.
    """
    if match := _LAYER.match(lora_name):
        side, level, kind, layer = match.groups()
        place = 3 * int(level) + (2 if kind.endswith("samplers") else int(layer))
        if side == "down":
            return 1 + place + (1 if sdxl else 0)
        return 13 + place
    if match := _MID_LAYER.match(lora_name):
        if not sdxl:
            return 12
        kind, layer = match.groups()
        return 11 if kind == "attentions" else 10 + 2 * int(layer)
    return 0


def plan_blocks(
    options: Mapping[str, Any],
    sdxl: bool,
    dim: int,
    alpha: float,
    conv_dim: int | None,
    conv_alpha: float,
) -> BlockPlan | None:
    """The plan that the block-wise keys among `options` ask for; None without any.

    What is given for no block takes the network's rank and alpha. A block whose learning-rate
    weight is 0 gets no adapter.
    """
    weights = _lr_weights(options, "sdxl" if sdxl else "sd")
    if weights is None and "block_dims" not in options:
        return None
    count = NUM_BLOCKS["sdxl" if sdxl else "sd"]
    dims = _per_block(options, "block_dims", count, dim)
    alphas = _per_block(options, "block_alphas", count, alpha)
    conv_dims = conv_alphas = None
    if conv_dim is not None or "conv_block_dims" in options:
        conv_dims = _per_block(options, "conv_block_dims", count, conv_dim)
        conv_alphas = _per_block(options, "conv_block_alphas", count, conv_alpha)
    for block, weight in enumerate(weights or []):
        if weight == 0:
            dims[block] = 0
            if conv_dims is not None:
                conv_dims[block] = 0
    return BlockPlan(sdxl, dims, alphas, conv_dims, conv_alphas, weights)


def lr_weights_plan(options: Mapping[str, Any], sdxl: bool) -> BlockPlan | None:
    """Learning-rate weights alone, for a network whose ranks come from a file."""
    weights = _lr_weights(options, "sdxl" if sdxl else "sd")
    return None if weights is None else BlockPlan(sdxl, lr_weights=weights)


def _per_block(options: Mapping[str, Any], key: str, count: int, default: Any) -> list[Any]:
    values = options.get(key)
    if values is None:
        return [default] * count
    if len(values) != count:
        raise UserError(
            f"--network_args {key}: {len(values)} numbers, but this model has {count} blocks."
        )
    return list(values)


def _lr_weights(options: Mapping[str, Any], family: str) -> list[float] | None:
    keys = LR_WEIGHTS[:3]
    if all(options.get(key) is None for key in keys):
        return None
    threshold = options.get("block_lr_zero_threshold", 0.0)
    weights: list[float] = []
    for key, count in zip(keys, LR_WEIGHT_COUNTS[family], strict=True):
        given = options.get(key)
        if given is None:
            weights += [1.0] * count
        else:
            weights += [w if w > threshold else 0.0 for w in _fitted(key, given, count)]
    return [1.0, *weights, 1.0] if family == "sdxl" else weights


def _fitted(key: str, given: str | list[float], count: int) -> list[float]:
    """The weights of one side: too few are filled up with 1, too many are cut, as in stock."""
    if isinstance(given, str):
        return _shape(given, count)
    if len(given) != count:
        log.warning("--network_args %s has %d numbers for %d blocks", key, len(given), count)
    return [*given, *[1.0] * count][:count]


def _shape(text: str, count: int) -> list[float]:
    """A named course from the outermost block inwards (down) or from the innermost out (up)."""
    name, _, base = text.partition("+")
    rising = [index / (count - 1) for index in range(count)]
    courses = {
        "linear": rising,
        "reverse_linear": rising[::-1],
        "sine": [math.sin(math.pi * part / 2) for part in rising],
        "cosine": [math.sin(math.pi * part / 2) for part in rising[::-1]],
        "zeros": [0.0] * count,
    }
    return [value + float(base or 0) for value in courses[name]]
