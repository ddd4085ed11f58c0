"""The keys of a dataset config: where each may stand and what values it takes."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any

from library.optim.spelling import did_you_mean
from library.training.options import OPTIONS
from library.training.paths import clean_path

# Takes a value as it was written and returns it as it is used; ValueError says what was expected.
Reader = Callable[[Any], Any]


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text in quotes")
    return value


def attributes(value: Any) -> dict[str, Any]:
    """custom_attributes: whatever the user likes, but for the one that asks for something."""
    if not isinstance(value, dict):
        raise ValueError("a table of values")
    if value.get("diff_output_preservation"):
        raise ValueError("a table without diff_output_preservation, which is not built yet")
    return value


def path(value: Any) -> str:
    return clean_path(text(value)) or ""


def extension(value: Any) -> str:
    """A file's extension, with its dot."""
    ending = text(value)
    return ending if ending.startswith(".") or not ending else f".{ending}"


def whole(minimum: int) -> Reader:
    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"a whole number from {minimum} on")
        return value

    return read


def number(minimum: float, maximum: float | None = None) -> Reader:
    bounds = f"from {minimum:g} on" if maximum is None else f"from {minimum:g} to {maximum:g}"

    def read(value: Any) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value < minimum or (maximum is not None and value > maximum):
            raise ValueError(f"a number {bounds}")
        return float(value)

    return read


def _parts(value: Any, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of a list, of text with commas, or a single one."""
    try:
        if isinstance(value, str):
            return [kind(part) for part in value.split(",")]
        return list(value) if isinstance(value, (list, tuple)) else [value]
    except ValueError:
        return []


def size(value: Any) -> tuple[int, int]:
    """A resolution: 512, [512, 768], "512" or "512,768", as (width, height)."""
    parts = _parts(value, int)
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2 or not all(type(part) is int and part > 0 for part in parts):
        raise ValueError("a size such as 512, or width and height such as [512, 768]")
    return parts[0], parts[1]


def factor_range(value: Any) -> tuple[float, float]:
    parts = _parts(value, float)
    valid = len(parts) == 2 and all(
        isinstance(part, (int, float)) and not isinstance(part, bool) and part > 0 for part in parts
    )
    if not valid or parts[0] > parts[1]:
        raise ValueError("two factors in ascending order, such as [2.0, 4.0]")
    return float(parts[0]), float(parts[1])


INTERPOLATIONS = (
    "lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box",
)  # fmt: skip


def interpolation(value: Any) -> str:
    if value not in INTERPOLATIONS:
        raise ValueError(f"one of {', '.join(INTERPOLATIONS)}")
    return str(value)


def only_one(value: Any) -> float:
    """network_multiplier: nothing here scales the adapter by dataset."""
    if value != 1:
        raise ValueError("1, as other strengths of the adapter by dataset are not built yet")
    return 1.0


DATASET_KEYS: dict[str, Reader] = {
    "batch_size": whole(1),
    "resolution": size,
    "enable_bucket": flag,
    "min_bucket_reso": whole(1),
    "max_bucket_reso": whole(1),
    "bucket_reso_steps": whole(1),
    "bucket_no_upscale": flag,
    "network_multiplier": only_one,
    "prior_loss_weight": number(0),
    "validation_seed": whole(0),
    "validation_split": number(0, 1),
    "resize_interpolation": interpolation,
}
_CAPTION_FILE_KEYS: dict[str, Reader] = {
    "caption_extension": extension,
    "class_tokens": text,
    "cache_info": flag,
}
SUBSET_KEYS: dict[str, Reader] = {
    "num_repeats": whole(0),
    "color_aug": flag,
    "flip_aug": flag,
    "face_crop_aug_range": factor_range,
    "random_crop": flag,
    "shuffle_caption": flag,
    "caption_separator": text,
    "keep_tokens": whole(0),
    "keep_tokens_separator": text,
    "secondary_separator": text,
    "enable_wildcard": flag,
    "token_warmup_min": whole(0),
    "token_warmup_step": number(0),
    "caption_prefix": text,
    "caption_suffix": text,
    "caption_dropout_rate": number(0, 1),
    "caption_dropout_every_n_epochs": whole(0),
    "caption_tag_dropout_rate": number(0, 1),
    "custom_attributes": attributes,
    "resize_interpolation": interpolation,
    **_CAPTION_FILE_KEYS,
}
_OWN_KEYS: dict[str, Reader] = {  # of a subset alone
    "image_dir": path,
    "alpha_mask": flag,
    "conditioning_data_dir": path,
    "validation_seed": whole(0),
    "validation_split": number(0, 1),
}


def _without(keys: Mapping[str, Reader], left_out: Mapping[str, Reader]) -> dict[str, Reader]:
    return {key: reader for key, reader in keys.items() if key not in left_out}


class Level(enum.Enum):
    """A place of the config; datasets of metadata files have no captions beside the pictures."""

    GENERAL = "[general]"
    DATASET = "[[datasets]]"
    SUBSET = "[[datasets.subsets]]"
    METADATA_DATASET = "[[datasets]] with metadata_file"
    METADATA_SUBSET = "[[datasets.subsets]] with metadata_file"


_SHARED = _without(DATASET_KEYS, {"prior_loss_weight": flag})  # that one is the command line's
KEYS: dict[Level, dict[str, Reader]] = {
    Level.GENERAL: {**_SHARED, **SUBSET_KEYS},
    Level.DATASET: {**_SHARED, **SUBSET_KEYS},
    Level.SUBSET: {**SUBSET_KEYS, **_OWN_KEYS, "is_reg": flag},
    Level.METADATA_DATASET: {**_SHARED, **_without(SUBSET_KEYS, _CAPTION_FILE_KEYS)},
    Level.METADATA_SUBSET: {
        **_without(SUBSET_KEYS, _CAPTION_FILE_KEYS),
        **_OWN_KEYS,
        "metadata_file": path,
    },
}


def read_level(values: Any, level: Level, where: str, problems: list[str]) -> dict[str, Any]:
    """The values of one table, checked; what is wrong is added to `problems`."""
    if not isinstance(values, dict):
        problems.append(f"{where}: expected a table of values, not {values!r}")
        return {}
    read: dict[str, Any] = {}
    for key, value in values.items():
        reader = KEYS[level].get(key)
        if reader is None:
            problems.append(f"{where}.{key} is not an option here{_advice(key, level)}")
            continue
        try:
            read[key] = reader(value)
        except ValueError as expected:
            problems.append(f"{where}.{key}: expected {expected}, not {value!r}")
    return read


def _advice(key: str, level: Level) -> str:
    """Where an unknown key belongs, or which one was probably meant."""
    with_files = {Level.METADATA_DATASET: Level.DATASET, Level.METADATA_SUBSET: Level.SUBSET}
    if level in with_files and key in KEYS[with_files[level]]:
        return ": it does not go with metadata_file"
    order = (Level.SUBSET, Level.DATASET, Level.GENERAL, Level.METADATA_SUBSET)
    elsewhere = [other.value for other in order if key in KEYS[other]]
    if elsewhere:
        return f": it belongs in {elsewhere[0]}"
    renamed = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}
    if key in renamed:
        return f": in this file it is called {renamed[key]}"
    if key in OPTIONS:
        return f": it is an option of the command line, --{key}"
    hint = did_you_mean(key, KEYS[level], "{}")
    return f".{hint}" if hint else f": {level.value} does not have it"
