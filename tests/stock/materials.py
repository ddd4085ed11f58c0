"""What a real sd-scripts trains on here: a model of full size, made once, and small things beside.

Its UNet has the sizes of Stable Diffusion 1.5 written into it, so a smaller model would not load.
The weights are random: what is looked at is which parameters train and how, not pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from picture_folders import write_folder
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

STAND_IN = Path(__file__).parent / "stand_in"
TOKENIZER = "openai_clip-vit-large-patch14"  # where sd-scripts looks in --tokenizer_cache_dir
_VOCABULARY = 49408
_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_TEXT_ENCODER = CLIPTextConfig(
    vocab_size=_VOCABULARY,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
)
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def write_model(folder: Path) -> None:
    """Stable Diffusion 1.5 with random weights, in the layout of diffusers."""
    torch.manual_seed(0)
    UNet2DConditionModel(**_UNET).half().save_pretrained(folder / "unet")
    AutoencoderKL(**_VAE).half().save_pretrained(folder / "vae")
    _write_text_encoder(folder / "text_encoder")
    DDIMScheduler(**_SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.25.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _write_text_encoder(folder: Path) -> None:
    """With the names that every version of transformers reads; from 5 on it writes shorter ones."""
    weights = CLIPTextModel(_TEXT_ENCODER).half().state_dict()
    full = {f"text_model.{name.removeprefix('text_model.')}": x for name, x in weights.items()}
    _TEXT_ENCODER.save_pretrained(folder)
    save_file(full, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer without merges, for `--tokenizer_cache_dir`: every byte is a token of its
    own, and the ids of the special ones are those of the real tokenizer."""
    target = folder / TOKENIZER
    target.mkdir(parents=True)
    letters = _letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [f"<|unused{number}|>" for number in range(_VOCABULARY - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (target / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (target / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 77,
        "do_lower_case": True,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config))


def _letters() -> list[str]:
    """The printable stand-ins of the 256 bytes, in CLIP's order: those that print are themselves,
    the others follow from U+0100 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printing), *(chr(0x100 + k) for k in range(256 - len(printing)))]


def write_pictures(folder: Path) -> None:
    """Four pictures of 64 by 64 with captions, as `--train_data_dir` wants them."""
    write_folder(folder / "1_icon", 4)
