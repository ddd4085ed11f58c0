"""Prompt files for sampling, in stock's three forms.

Text, one prompt a line, `#` comments:

    red apple, flat style --n photo, blurry --w 512 --h 512 --d 42 --s 25 --l 7.5 --ss euler_a

TOML, where a subset overrides what `[prompt]` says for all:

    [prompt]
    width = 512
    [[prompt.subset]]
    prompt = "red apple, flat style"
    seed = 42

JSON: a list of such lines, or of objects with the TOML keys.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from library.training.samplers import SAMPLERS
from library.training.toml_file import read_toml

log = logging.getLogger(__name__)

MAX_STEPS = 1000
SMALLEST_SIDE = 64
LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Prompt:
    """One picture to draw. The defaults are stock's.

    Sizes are in pixels and multiples of 8. `seed` None: the run's own. `sampler` None: that of
    `--sample_sampler`. `index` is the position in the file and names the pictures.
    """

    text: str
    negative: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None
    steps: int = 30
    scale: float = 7.5
    sampler: str | None = None
    index: int = 0


# The long keys are those of TOML and JSON.
FLAGS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "ss": "sample_sampler",
    "g": "guidance_scale",
    "cn": "controlnet_image",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
}
INTEGERS = {"width", "height", "seed", "sample_steps"}
NUMBERS = INTEGERS | {"scale"}
# Stock reads these for other families of models (Flux, SD3, Lumina, ControlNet training).
FOR_OTHER_MODELS = {
    "guidance_scale",
    "controlnet_image",
    "cfg_trunc_ratio",
    "renorm_cfg",
    "flow_shift",
}
KEYS = {"prompt", "subset", "enum", *FLAGS.values()}


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a .txt, .toml or .json file; UserError names file, line and mistake."""
    path = Path(path)
    readers = {".txt": _read_text, ".toml": _read_toml, ".json": _read_json}
    if path.suffix not in readers:
        raise UserError(f"--sample_prompts: {path} must be a .txt, .toml or .json file.")
    if not path.is_file():
        raise UserError(f"--sample_prompts: there is no file {path}.")
    entries = readers[path.suffix](path)
    if not entries:
        raise UserError(f"--sample_prompts: {path} holds no prompts. Write one a line.")
    return [_prompt(fields, index, where) for index, (where, fields) in enumerate(entries)]


Entry = tuple[str, dict[str, Any]]  # where it was found, for messages; its fields by long key


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors begin with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"--sample_prompts: {path} is not UTF-8 text ({error}).") from error


def _read_text(path: Path) -> list[Entry]:
    entries = []
    for number, line in enumerate(_decode(path).splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            where = f"{path}, line {number}"
            entries.append((where, parse_line(line.strip(), where)))
    return entries


def _read_toml(path: Path) -> list[Entry]:
    table = read_toml(path).get("prompt")
    if not isinstance(table, dict):
        raise UserError(f"{path}: there is no [prompt] table (with [[prompt.subset]] in it).")
    subsets = table.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"{path}: 'subset' must be written as [[prompt.subset]].")
    return [
        (f"{path}, prompt {number}", {**table, **subset})
        for number, subset in enumerate(subsets, start=1)
    ]


def _read_json(path: Path) -> list[Entry]:
    try:
        items = json.loads(_decode(path))
    except json.JSONDecodeError as error:
        raise UserError(f"--sample_prompts: {path} is not valid JSON: {error}.") from error
    if not isinstance(items, list):
        raise UserError(f"{path}: the file must hold a list of prompts.")
    entries = []
    for number, item in enumerate(items, start=1):
        where = f"{path}, prompt {number}"
        if isinstance(item, str):
            item = parse_line(item, where)
        if not isinstance(item, dict):
            raise UserError(f"{where}: a prompt is a text or an object, not {item!r}.")
        entries.append((where, item))
    return entries


def parse_line(line: str, where: str) -> dict[str, Any]:
    """The fields of one prompt line by their long keys, values not yet checked for range."""
    text, *options = line.split(" --")
    fields: dict[str, Any] = {"prompt": text}
    for option in options:
        flag, _, value = option.strip().partition(" ")
        key = FLAGS.get(flag.lower())
        if key is None:
            raise UserError(
                f"{where}: there is no option '--{flag}'.{did_you_mean(flag, FLAGS)} "
                f"Known: {', '.join(f'--{name}' for name in FLAGS)}."
            )
        fields[key] = _number(value, flag, key, where) if key in NUMBERS else value.strip()
    return fields


def _number(value: str, flag: str, key: str, where: str) -> int | float:
    # Whole numbers may be followed by punctuation, which stock's pattern lets pass, too.
    pattern = r"\d+" if key in INTEGERS else r"\d+\.?\d*|\.\d+"
    if key == "seed":
        pattern = r"-?\d+"
    match = re.fullmatch(rf"({pattern})[\s,.;]*", value.strip())
    if match is None:
        kind = "a whole number" if key in INTEGERS else "a number"
        raise UserError(f"{where}: '--{flag}' needs {kind}, not {value.strip()!r}.")
    return int(match[1]) if key in INTEGERS else float(match[1])


def _prompt(fields: dict[str, Any], index: int, where: str) -> Prompt:
    for key, value in fields.items():
        if key not in KEYS:
            raise UserError(f"{where}: there is no key '{key}'.{did_you_mean(key, KEYS)}")
        if key in FOR_OTHER_MODELS:
            log.warning("%s: %s is not for Stable Diffusion and changes nothing", where, key)
        elif key not in ("subset", "enum"):
            _check_type(key, value, where)
    sampler = fields.get("sample_sampler")
    if sampler is not None and sampler not in SAMPLERS:
        raise UserError(
            f"{where}: there is no sampler '{sampler}'.{did_you_mean(sampler, SAMPLERS)} "
            f"Known: {', '.join(SAMPLERS)}."
        )
    seed = fields.get("seed")
    if seed is not None and seed > LARGEST_SEED:
        raise UserError(f"{where}: the seed {seed} is too large; {LARGEST_SEED} is the largest.")
    return Prompt(
        text=fields.get("prompt", ""),
        negative=fields.get("negative_prompt", ""),
        width=_side(fields.get("width", Prompt.width)),
        height=_side(fields.get("height", Prompt.height)),
        seed=None if seed is None or seed < 0 else seed,  # -1 is a habit for "any"
        steps=max(1, min(MAX_STEPS, fields.get("sample_steps", Prompt.steps))),
        scale=float(fields.get("scale", Prompt.scale)),
        sampler=sampler,
        index=index,
    )


def _check_type(key: str, value: Any, where: str) -> None:
    if key in INTEGERS:
        fits, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif key in NUMBERS:
        fits, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    else:
        fits, kind = isinstance(value, str), "a text"
    if not fits:
        raise UserError(f"{where}: '{key}' must be {kind}, not {value!r}.")


def _side(pixels: int) -> int:
    """Rounded down to a multiple of 8, and no less than 64."""
    return max(SMALLEST_SIDE, pixels - pixels % 8)
