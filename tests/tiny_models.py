"""Tiny Stable Diffusion models: built from config, seeded, saved as diffusers folders.

The architectures are the real ones at a fraction of the size: every module a test may ask for by
name or by class is there (cross attention in down, mid and up blocks, resnets, samplers, SDXL's
second text encoder and its size conditioning). A picture of 64×64 gives latents of 8×8.

    def test_something(tiny_sd1): options = Options(pretrained_model_name_or_path=str(tiny_sd1))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Kind = Literal["sd1", "sd2", "sdxl"]

TEXT_WIDTH = 32
SECOND_TEXT_WIDTH = 48
TEXT_LAYERS = 3
# A few words that are one token each; all else is spelled out, one token a letter.
WHOLE_WORDS = ("red", "cat", "icon")


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for the bytes in CLIP's byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = range(256 - len(printable))
    return [chr(code) for code in printable] + [chr(256 + index) for index in others]


def write_vocabulary(folder: Path) -> int:
    """Write vocab.json and merges.txt as CLIP orders them: '!' first, end-of-text last."""
    letters = byte_alphabet()
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WHOLE_WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
                tokens.append(pieces[0] + pieces[1])
            pieces[:2] = [pieces[0] + pieces[1]]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(tokens)


def build_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer with a context of 77 tokens."""
    write_vocabulary(folder)
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token=pad_token,
        model_max_length=77,
    )


def build_text_encoder(
    vocabulary: int, activation: str, width: int = TEXT_WIDTH, projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        # Initial weights this large make different captions give plainly different embeddings.
        initializer_factor=2.0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def build_unet(kind: Kind) -> UNet2DConditionModel:
    figures: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": TEXT_WIDTH,
    }
    if kind == "sd2":
        figures |= {"attention_head_dim": (4, 8), "use_linear_projection": True}
    if kind == "sdxl":
        figures |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (4, 8),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": TEXT_WIDTH + SECOND_TEXT_WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + SECOND_TEXT_WIDTH,
        }
    return UNet2DConditionModel(**figures)


def build_vae(scaling_factor: float, channels: tuple[int, ...] = (8, 8, 16, 16)) -> AutoencoderKL:
    """Each level but the last halves the picture: four levels give the usual factor of 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
        force_upcast=scaling_factor == 0.13025,
    )


def build_pipeline(
    kind: Kind, folder: Path, seed: int = 0
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A whole model with seeded weights; `folder` receives the vocabulary files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pad_token = "!" if kind == "sd2" else "<|endoftext|>"
        tokenizer = build_tokenizer(folder / "tokenizer", pad_token)
        activation = "gelu" if kind == "sd2" else "quick_gelu"
        parts: dict[str, Any] = {
            "text_encoder": build_text_encoder(len(tokenizer), activation),
            "tokenizer": tokenizer,
            "unet": build_unet(kind),
            "vae": build_vae(0.13025 if kind == "sdxl" else 0.18215),
            "scheduler": DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type="v_prediction" if kind == "sd2" else "epsilon",
            ),
        }
        if kind == "sdxl":
            parts["text_encoder_2"] = build_text_encoder(
                len(tokenizer), "gelu", SECOND_TEXT_WIDTH, projection=True
            )
            parts["tokenizer_2"] = build_tokenizer(folder / "tokenizer_2", "!")
            return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def save_tiny_model(kind: Kind, folder: Path, seed: int = 0) -> Path:
    """Build the model and save it as a diffusers folder (float32 safetensors, under 2 MB)."""
    build_pipeline(kind, folder, seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.x: epsilon prediction, padded with end-of-text."""
    return save_tiny_model("sd1", tmp_path_factory.mktemp("tiny_sd1"))


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 2.x: v-prediction, padded with '!'."""
    return save_tiny_model("sd2", tmp_path_factory.mktemp("tiny_sd2"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL: two text encoders, size conditioning."""
    return save_tiny_model("sdxl", tmp_path_factory.mktemp("tiny_sdxl"))
