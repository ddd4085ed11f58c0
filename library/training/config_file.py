"""`--config_file`: options in TOML, read with every mistake at once, and written."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from library.training.options import OPTIONS, Option
from library.training.options.fields import int_or_float, steps_or_ratio
from library.training.toml_file import read_toml, write_toml

# Values that front ends write for what is the default here.
_DEFAULTS_SPELT_OUT: dict[str, Any] = {"max_token_length": 75, "dynamo_backend": "no"}

# Keys that front ends write and no version of sd-scripts' adapter training reads.
_UNREAD = {
    "epoch": "--max_train_epochs sets the number of epochs",
    "noise_offset_type": "--noise_offset and --multires_noise_iterations choose the noise",
    "stop_text_encoder_training": (
        "the text encoder's adapter is trained to the end, or not at all with "
        "--network_train_unet_only"
    ),
    "lr_restart_cycles": "--lr_scheduler_num_cycles sets the number of restarts",
}

_SECRET = ("wandb_api_key", "huggingface_token")


def config_path(name: str) -> Path:
    """The file that `--config_file name` means: the ending .toml may be left out."""
    path = Path(name)
    if name.endswith(".toml"):
        return path
    with_ending = Path(f"{name}.toml")
    return path if path.is_file() and not with_ending.is_file() else with_ending


def read_config_file(
    name: str, more_names: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """(values, notes) of the options in a config file; its sections don't matter.

    `more_names` are names that a trainer's own parser has besides ours; their values are taken as
    they are. UserError lists every unknown name, wrong type and impossible choice.
    """
    path = config_path(name)
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*.toml")]
        hint = did_you_mean(path.name, there, f"{path.parent / '{}'}")
        raise UserError(f"--config_file {name}: there is no file {path}.{hint}")
    values: dict[str, Any] = {}
    problems: list[str] = []
    notes: list[str] = []
    for key, value in _flatten(path, read_toml(path), problems):
        if key in OPTIONS:
            try:
                values[key] = convert(OPTIONS[key], value)
            except ValueError as error:
                problems.append(f"{path}: {error}.")
        elif key in more_names:
            values[key] = value
        elif key in _UNREAD:
            notes.append(f"{path}: '{key}' is left unread, as by sd-scripts; {_UNREAD[key]}.")
        else:
            hint = did_you_mean(key, [*OPTIONS, *more_names])
            problems.append(f"{path}: '{key}' is not an option.{hint}")
    if problems:
        raise UserError.listing(problems)
    return values, notes


def _flatten(
    path: Path, table: Mapping[str, Any], problems: list[str]
) -> Iterator[tuple[str, Any]]:
    """The keys of all sections, each once."""
    if isinstance(table.get("datasets"), list):
        problems.append(
            f"{path}: this file describes datasets. Give it to --dataset_config, and a file with "
            "the run's options to --config_file."
        )
        return
    seen: dict[str, tuple[str, Any]] = {}
    for section, content in table.items():
        for key, value in content.items() if isinstance(content, dict) else [(section, content)]:
            if key not in seen:
                yield key, value
            elif seen[key][1] != value:
                problems.append(
                    f"{path}: '{key}' stands there twice, as {seen[key][1]!r} in [{seen[key][0]}] "
                    f"and as {value!r} in [{section}]."
                )
            seen[key] = (section, value)


def convert(option: Option, value: Any) -> Any:
    """`value` from a config file as the option's own type. ValueError says what was expected."""
    if value == _DEFAULTS_SPELT_OUT.get(option.name, ...):
        return option.default
    if option.many:
        items = value if isinstance(value, list) else [value]  # stock takes a lone number too
        return [_convert_one(option, item, value) for item in items if item != ""]
    if option.name in ("resolution", "face_crop_aug_range") and isinstance(value, (int, list)):
        items = value if isinstance(value, list) else [value]
        return ",".join(str(item) for item in items)
    if value == "" and option.default is None:
        return None
    converted = _convert_one(option, value, value)
    problem = option.choice_problem(converted)
    if problem:
        raise ValueError(problem.removeprefix("--"))
    return converted


def _convert_one(option: Option, value: Any, whole: Any) -> Any:
    kind, is_bool = option.kind, isinstance(value, bool)
    number = isinstance(value, (int, float)) and not is_bool
    if kind is bool and (is_bool or value in (0, 1)):
        return bool(value)
    if kind is int and number and value == int(value):
        return int(value)
    if kind is float and number:
        return value
    if kind in (str, Path) and isinstance(value, str):
        return value
    if kind is int_or_float and (number or isinstance(value, str)):
        try:
            return steps_or_ratio(value) if number else int_or_float(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{option.name} = {_literal(whole)}: {error}") from None
    raise ValueError(f"{option.name} = {_literal(whole)}: expected {option.expected}")


def _literal(value: Any) -> str:
    """`value` as it stands in the file, near enough to be found."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def write_config_file(name: str, values: Mapping[str, Any]) -> Path:
    """Write the options that differ from their defaults; keys and tokens are left out.

    UserError if the file is there already: it may be the only copy of somebody's settings.
    """
    path = config_path(name)
    if path.exists():
        raise UserError(
            f"--output_config: {path} is there already and stays as it is. Name another "
            "--config_file, or remove it first."
        )
    left_out = {"config_file", "output_config", *_SECRET}
    chosen = [
        (key, str(value) if isinstance(value, Path) else value)
        for key, value in values.items()
        if key not in left_out and key in OPTIONS and value != OPTIONS[key].default
    ]
    try:
        write_toml(path, chosen, "options of train_network.py")
    except OSError as error:
        raise UserError(f"--config_file {path} cannot be written: {error.strerror}.") from None
    return path
