"""A CLIP of a few thousand parameters, from its configuration, and pictures for it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPConfig

from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from models.clip import FederatedCLIPModel

CLASSES = 4


def clip_config(**vision: object) -> CLIPConfig:
    layer = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return CLIPConfig(
        text_config={
            **layer,
            "vocab_size": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={**layer, "image_size": 8, "patch_size": 4, **vision},
        projection_dim=8,
    )


def host(
    seed: int = 0,
    num_classes: int = CLASSES,
    vision: dict[str, object] | None = None,
    **rest: bool,
) -> FederatedCLIPModel:
    torch.manual_seed(seed)
    return FederatedCLIPModel.from_config(clip_config(**vision or {}), num_classes, **rest)


def wrapped(
    components: tuple[str, ...] = ("encoder",),
    seed: int = 0,
    num_classes: int = CLASSES,
    normalize_features: bool = True,
    vision: dict[str, object] | None = None,
    **config: object,
) -> CLIPLoRAWrapper:
    """LoRA of rank 4 applied, without dropout unless `config` says otherwise."""
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **config}
    base = host(seed, num_classes, vision, normalize_features=normalize_features)
    wrapper = CLIPLoRAWrapper(base, LoRAConfig(**settings), components)
    wrapper.apply_lora_to_federated_model()
    return wrapper


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return images, torch.arange(count) % CLASSES


def trained(wrapper: CLIPLoRAWrapper, steps: int = 3) -> CLIPLoRAWrapper:
    for _ in range(steps):
        wrapper.train_step(*batch())
    return wrapper.eval()
