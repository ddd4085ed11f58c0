"""Which layers a network adapts, and LyCORIS's presets as such a choice.

LyCORIS itself keeps the preset in attributes of its class, where one network's preset acts on the
next, and some presets of lycoris-lora 4.1.3 stop on diffusers' UNet with 'duplicated lora name'
(`full`) or match nothing there (`ia3`, `attn-only`). Here a preset is a value, each layer that it
asks for is found once, and classes and names are understood as they were meant.
"""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from networks.keys import (
    CONSTRUCTOR_NAMES,
    LAYER_ONLY,
    dora_conflicts,
    layer_keys,
    read_values,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = (
    "full",
    "full-lin",
    "attn-mlp",
    "attn-only",
    "unet-only",
    "unet-transformer-only",
    "unet-convblock-only",
    "ia3",
)
# The algorithms of LyCORIS that can be had here; locon is another word for lora.
ALGORITHMS = ("lora", "locon", "loha", "lokr", "full", "glora", "diag-oft", "boft", "ia3")

# What other trainers' UNets call by these names is diffusers' Attention.
_SAME_CLASS = {"CrossAttention": "Attention", "SelfAttention": "Attention"}
# A preset file may call keys as `--network_args` does or as LyCORIS's modules do.
_OUR_NAMES = {theirs: ours for ours, theirs in CONSTRUCTOR_NAMES.items()}


@dataclass(frozen=True)
class Targets:
    """Layers of one model: those inside of modules of `classes`, and those that `names` match."""

    classes: frozenset[str]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """Which layers get an adapter; by class or name another algorithm, rank, …"""

    unet: Targets
    text_encoder: Targets
    convolutions: bool = True  # larger than 1×1
    by_class: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    by_name: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    wildcards: bool = False  # names are fnmatch patterns instead of regular expressions

    def matches(self, pattern: str, path: str) -> bool:
        """As in LyCORIS: the path itself, or a pattern from its start (a wildcard: all of it)."""
        if path == pattern:
            return True
        if self.wildcards:
            return fnmatch.fnmatch(path, pattern)
        return re.match(pattern, path) is not None

    def is_target(self, name: str, path: str) -> bool:
        """A plain name of a target also means the end of a path: `to_k` is every such layer."""
        return path.endswith("." + name) or self.matches(name, path)

    def config(self, targets: Targets, path: str, classes: list[str]) -> dict[str, Any] | None:
        """The layer's own settings ({} for none), or None if it gets no adapter.

        Args:
            path: of the layer, as in `named_modules`.
            classes: of the modules it is in, from the outermost to itself.
        """
        if any(self.matches(pattern, path) for pattern in self.excluded):
            return None
        by_name = any(self.is_target(name, path) for name in targets.names)
        if not by_name and targets.classes.isdisjoint(classes):
            return None
        if by_name:
            patterns = [path] if path in self.by_name else self.by_name
            for pattern in patterns:
                if self.matches(pattern, path):
                    return dict(self.by_name[pattern])
        for name in reversed(classes):
            if name in self.by_class:
                return dict(self.by_class[name])
        return {}


def stock_selection(convolutions: bool) -> Selection:
    """Linear and 1×1 layers of the transformers; with `conv_dim` the resnets and samplers too."""
    resnets = {"ResnetBlock2D", "Downsample2D", "Upsample2D"} if convolutions else set()
    return Selection(
        unet=Targets(frozenset({"Transformer2DModel"} | resnets)),
        text_encoder=Targets(frozenset({"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"})),
    )


def preset_selection(name: str, algorithm: str) -> Selection:
    """A preset by LyCORIS's name or from a TOML file; what a file leaves out is as in `full`.

    `algorithm` is the network's, for entries that name none.
    """
    from lycoris.config import PRESET

    own = name in PRESETS
    preset = PRESET["full"] | (PRESET[name] if own else read_preset(Path(name), algorithm))

    def targets(part: str) -> Targets:
        classes = preset[f"{part}_target_module"]
        return Targets(
            frozenset(_SAME_CLASS.get(entry, entry) for entry in classes),
            tuple(preset[f"{part}_target_name"]),
        )

    def settings(table: str) -> dict[str, dict[str, Any]]:
        entries = preset.get(table, {})
        return {key: layer_settings("", entry, algorithm)[0] for key, entry in entries.items()}

    by_class, by_name = settings("module_algo_map"), settings("name_algo_map")
    if own:  # in LyCORIS's own a name means the end of a path
        by_name = {rf"(.*\.)?{re.escape(end)}$": config for end, config in by_name.items()}
    return Selection(
        unet=targets("unet"),
        text_encoder=targets("text_encoder"),
        convolutions=preset["enable_conv"],
        by_class={_SAME_CLASS.get(entry, entry): config for entry, config in by_class.items()},
        by_name=by_name,
        excluded=tuple(preset.get("exclude_name", ())),
        wildcards=preset.get("use_fnmatch", False),
    )


_KEYS = {
    "enable_conv": bool,
    "unet_target_module": list,
    "unet_target_name": list,
    "text_encoder_target_module": list,
    "text_encoder_target_name": list,
    "module_algo_map": dict,
    "name_algo_map": dict,
    "use_fnmatch": bool,
    "exclude_name": list,
}


def read_preset(
    path: Path, algorithm: str, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A preset file's keys as LyCORIS names them; UserError that lists all that is wrong.

    Args:
        algorithm: the network's, for entries that name none.
        options: the network's keys, which hold where an entry doesn't say otherwise.
    """
    try:
        preset = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--network_args preset={path}: cannot be read: {error}") from error
    problems = [
        f"{path}: unknown key '{key}'.{did_you_mean(key, tuple(_KEYS))}"
        for key in preset
        if key not in _KEYS
    ]
    problems += [
        f"{path}: '{key}' must be a {_KEYS[key].__name__}."
        for key, value in preset.items()
        if key in _KEYS and not isinstance(value, _KEYS[key])
    ]
    if not problems:
        problems = [
            *_pattern_problems(path, preset),
            *_entry_problems(path, preset, algorithm, options or {}),
        ]
    if problems:
        raise UserError.listing(problems)
    return preset


def layer_settings(
    where: str, entry: Mapping[str, Any], algorithm: str
) -> tuple[dict[str, Any], list[str]]:
    """What an entry sets, typed and as `--network_args` calls it, and what is wrong with it.

    Args:
        where: stands before a key in messages.
        algorithm: the one that is meant where the entry names none.
    """
    algorithm = str(entry.get("algo", algorithm))
    if algorithm not in ALGORITHMS:
        hint = did_you_mean(algorithm, ALGORITHMS)
        return {}, [f"{where}algo '{algorithm}' is none of {', '.join(ALGORITHMS)}.{hint}"]
    known = LAYER_ONLY | layer_keys(algorithm)
    values, unknown, problems = read_values(where, entry, _OUR_NAMES, known)
    for key in unknown:
        hint = did_you_mean(key, known) or f" It takes {', '.join(known)}."
        problems.append(f"{where}{key}: {algorithm} has no such key.{hint}")
    return values, problems


def _pattern_problems(path: Path, preset: Mapping[str, Any]) -> Iterator[str]:
    """Names that are no regular expressions, such as wildcards without `use_fnmatch`."""
    if preset.get("use_fnmatch"):
        return
    lists = ("unet_target_name", "text_encoder_target_name", "exclude_name", "name_algo_map")
    for key in lists:
        for pattern in preset.get(key, ()):
            try:
                re.compile(str(pattern))
            except re.error as error:
                yield (
                    f"{path}: {key}: '{pattern}' is no regular expression ({error}). For wildcards "
                    "such as *.conv1 set use_fnmatch = true."
                )


def _entry_problems(
    path: Path, preset: Mapping[str, Any], algorithm: str, options: Mapping[str, Any]
) -> Iterator[str]:
    for table in ("module_algo_map", "name_algo_map"):
        for name, entry in preset.get(table, {}).items():
            where = f"{path}: [{table}.{name}] "
            if not isinstance(entry, dict):
                yield f"{where}must be a table of keys and values."
                continue
            values, problems = layer_settings(where, entry, algorithm)
            yield from problems
            both = {**options, **values}
            own = values.get("algo", algorithm)
            yield from dora_conflicts(where, own, both, both.get("dropout"))


def check_preset(
    preset: str, algorithm: str, options: Mapping[str, Any] | None = None
) -> list[str]:
    """What is wrong with a preset, by name or file, in words for the user; as `read_preset`."""
    if preset in PRESETS:
        return []
    if not Path(preset).is_file():
        return [
            f"--network_args preset={preset}: there is no such preset and no such file."
            f"{did_you_mean(preset, PRESETS)} Presets: {', '.join(PRESETS)}."
        ]
    try:
        read_preset(Path(preset), algorithm, options)
    except UserError as error:
        return [str(error)]
    return []
