"""CLIP's tokenizer from the merges that ship with the project (`model_configs/README.md`)."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

MERGES = Path(__file__).parent / "model_configs" / "clip_tokenizer" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """The tokenizer of all Stable Diffusion models; SD 2.x and SDXL's second one pad with '!'."""
    text = gzip.decompress(MERGES.read_bytes()).decode("utf-8")
    lines = text.splitlines()[1:]  # the first line is the format's version
    letters = byte_letters()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(line.replace(" ", "") for line in lines),
        START,
        END,
    ]
    merges: Any = [tuple(line.split(" ")) for line in lines]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


def byte_letters() -> list[str]:
    """A printable character for each of the 256 bytes, in the vocabulary's order.

    The printable ones stand for themselves and come first, the others borrow from 256 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    borrowed = range(256, 256 + 256 - len(printable))
    return [chr(code) for code in (*printable, *borrowed)]
