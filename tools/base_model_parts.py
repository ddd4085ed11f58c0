"""The parts of the base model, untrained: small models of SD 1.x's classes, and a vocabulary."""

import copy
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers import DDIMScheduler
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_SIZE = 16
TEXT_WIDTH = 160
MAX_TOKENS = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def make_vae() -> AutoencoderKL:
    """64×64 RGB ↔ 16×16×4 latents. Norm groups of several channels keep flat colours."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(48, 128, 144),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4, 4),  # the number of heads, as in SD 1.x
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """SD 1.x's noise schedule."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=5,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one piece.

    Sennrich et al. 2016, arXiv:1508.07909, algorithm 1. `words`: how often each occurs.
    """
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in pieces.values():
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]


def make_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary learnt from the captions, of lower-case ASCII words.

    Every word of the captions becomes one token; any other text falls apart into pieces, down to
    single bytes. Writes `vocab.json` and `merges.txt` into `folder`.
    """
    words = Counter(
        word for caption in captions for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", caption)
    )
    merges = learn_merges(words)
    # CLIP's order: bytes, bytes that end a word, merges, then the two special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), BOS, EOS]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The one that `make_tokenizer` wrote into `folder`."""
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Writes the diffusers layout in float16; `folder/tokenizer` has its vocabulary already."""
    pipeline: Any = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        unet=copy.deepcopy(unet),
        text_encoder=copy.deepcopy(text_encoder),
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    for part in ("unet", "vae"):  # diffusers notes where a part was read from
        config = folder / part / "config.json"
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    # transformers 5 leaves out the level `text_model.` of the names, without which older versions
    # and sd-scripts find no weight; it reads either.
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    named = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in weights.items()}
    save_file(named, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
