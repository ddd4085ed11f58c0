"""From what is written beside a picture to the caption that a step trains on."""

from __future__ import annotations

import math
import os
import random
import re
from pathlib import Path

from library.training.dataset_config import SubsetSpec
from library.training.errors import UserError

# Stand for {{ and }} while wildcards are replaced; a caption never holds these control characters.
_OPENING, _CLOSING = "\x01", "\x02"


def vary_caption(
    raw: str,
    subset: SubsetSpec,
    rng: random.Random,
    epoch: int = 0,
    step: int = 0,
    max_steps: int = 0,
) -> str:
    """One caption out of a raw one, by the subset's options; all choices come from `rng`.

    The order is that of sd-scripts: dropout, line, prefix and suffix, wildcards, tags (kept,
    warmed up, shuffled, dropped), secondary separator. Two departures: prefix and suffix go to the
    line that is used, not to the ends of the whole file; and a keep_tokens_separator is always
    taken out of the caption, also when nothing is shuffled.

    Args:
        raw: the caption as it was written, of one or more lines.
        epoch: counted from 0. `caption_dropout_every_n_epochs` counts from 1, so 2 means the
            second, the fourth, …
        step, max_steps: the step this caption is for and how many there will be, for token warm-up.
    """
    rate, every = subset.caption_dropout_rate, subset.caption_dropout_every_n_epochs
    if (rate and rng.random() < rate) or (every and (epoch + 1) % every == 0):
        return ""
    caption = _one_line(raw, subset, rng)
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    if subset.caption_suffix:
        caption = f"{caption} {subset.caption_suffix}"
    if subset.enable_wildcard:
        caption = replace_wildcards(caption, rng)
    caption = _vary_tags(caption, subset, rng, step, max_steps)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    return caption


def _one_line(raw: str, subset: SubsetSpec, rng: random.Random) -> str:
    if "\n" not in raw:
        return raw
    lines = raw.split("\n")
    if not subset.enable_wildcard:
        return lines[0]
    return rng.choice([line for line in lines if line.strip()] or [""])


def replace_wildcards(caption: str, rng: random.Random) -> str:
    """`{a|b|c}` becomes one of a, b, c; `{{` and `}}` become single braces."""
    caption = caption.replace("{{", _OPENING).replace("}}", _CLOSING)
    caption = re.sub(r"\{([^}]+)\}", lambda found: rng.choice(found[1].split("|")), caption)
    return caption.replace(_OPENING, "{").replace(_CLOSING, "}")


def _vary_tags(
    caption: str, subset: SubsetSpec, rng: random.Random, step: int, max_steps: int
) -> str:
    """Shuffle, warm up and drop tags, except those that are to be kept."""
    kept_apart = bool(subset.keep_tokens_separator) and subset.keep_tokens_separator in caption
    varies = subset.shuffle_caption or subset.token_warmup_step or subset.caption_tag_dropout_rate
    if not (varies or kept_apart):
        return caption
    head, tags, tail = _split_tags(caption, subset, kept_apart)
    tags = tags[: _warmed_up(len(tags), subset, step, max_steps)]
    if subset.shuffle_caption:
        rng.shuffle(tags)
    if subset.caption_tag_dropout_rate:
        tags = [tag for tag in tags if rng.random() >= subset.caption_tag_dropout_rate]
    return ", ".join(head + tags + tail)  # ", " whatever the separator, as in sd-scripts


def _split_tags(
    caption: str, subset: SubsetSpec, kept_apart: bool
) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay in front, those that may vary, and those that stay at the end."""
    if kept_apart:
        parts = caption.split(subset.keep_tokens_separator, 2)
        tags = [
            [tag.strip() for tag in part.split(subset.caption_separator) if tag.strip()]
            for part in parts
        ]
        return tags[0], tags[1], tags[2] if len(tags) > 2 else []
    every = [tag.strip() for tag in caption.strip().split(subset.caption_separator)]
    return every[: subset.keep_tokens], every[subset.keep_tokens :], []


def _warmed_up(count: int, subset: SubsetSpec, step: int, max_steps: int) -> int:
    """How many of `count` tags are in use at `step`: from token_warmup_min linearly to all."""
    warmup = subset.token_warmup_step
    if warmup < 1:
        warmup = math.floor(warmup * max_steps)
    if step >= warmup:
        return count
    least = subset.token_warmup_min
    return max(0, math.floor(step * (count - least) / warmup) + least)


def caption_path(picture: str, extension: str) -> str | None:
    """The caption file of a picture: same name, other extension; None if there is none.

    A name that ends in a face's place and size (`name_x_y_width_height.png`, for the face crop)
    may leave that out in the caption file's name.
    """
    folder, name = os.path.split(os.path.splitext(picture)[0])
    parts = name.split("_")
    names = [name, "_".join(parts[:-4])] if len(parts) >= 5 else [name]
    paths = [os.path.join(folder, each + extension) for each in names]
    return next((path for path in paths if os.path.isfile(path)), None)


def read_caption(path: str) -> str:
    """The text of a caption file, its lines stripped; UserError if it is empty or not UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: the caption is not UTF-8 text (byte {error.start + 1}): save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: the caption cannot be read: {error.strerror}") from None
    if not text:
        raise UserError(
            f"{path}: the caption file is empty: write a caption, or remove the file to use "
            "class_tokens"
        )
    return "\n".join(line.strip() for line in text.rstrip("\n").split("\n"))
