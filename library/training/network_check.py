"""What is wrong with a run's network options, found before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from library.training.model_files import read_safetensors_header
from library.training.options import Options
from networks.arguments import ALGORITHM_OF, MODULES, check_arguments, check_numbers

# LyCORIS's own module, made by ours: the same algorithms, presets and files, but stock's names with
# every transformers version, presets that work on diffusers' UNet, and arguments that are checked.
OUR_NAME = {"lycoris.kohya": "networks.kohya"}

# Algorithms whose weights have no norm to scale down.
WITHOUT_MAX_NORM = ("full", "glora", "ia3")


def split_arguments(network_args: list[str] | None) -> tuple[dict[str, str], list[str]]:
    """`--network_args` as a dict, and those that are no `key=value`; the last of a key wins."""
    pairs: dict[str, str] = {}
    wrong = []
    for word in network_args or []:
        key, equals, value = word.partition("=")
        if equals and key:
            pairs[key.strip()] = value.strip()
        else:
            wrong.append(word)
    return pairs, wrong


def check_network(options: Options) -> list[str]:
    """Problems in words for the user; none of a network module that is not ours is known."""
    return list(_problems(options))


def _problems(options: Options) -> Iterator[str]:
    pairs, wrong = split_arguments(options.network_args)
    for word in wrong:
        yield f"--network_args {word}: must be key=value, such as conv_dim=4."
    name = OUR_NAME.get(options.network_module or "", options.network_module)
    if name in MODULES:
        yield from check_numbers(
            options.network_dim, options.network_alpha, options.network_dropout
        )
        yield from check_arguments(name, pairs, options.network_dropout)
        yield from _max_norm(options, ALGORITHM_OF.get(name) or pairs.get("algo", "lora"))
    elif name is not None and not _exists(name):
        hint = did_you_mean(name, [*MODULES, *OUR_NAME]) or f" There are {', '.join(MODULES)}."
        yield f"--network_module {name}: there is no such module.{hint}"
    yield from _files(options)


def _exists(module: str) -> bool:
    """Whether a module can be found; its packages are imported, itself is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _max_norm(options: Options, algorithm: str) -> Iterator[str]:
    if options.scale_weight_norms and algorithm.lower() in WITHOUT_MAX_NORM:
        yield (
            f"--scale_weight_norms {options.scale_weight_norms:g}: {algorithm} has no norm to "
            "scale down; leave it out."
        )


def _files(options: Options) -> Iterator[str]:
    for flag, files in (
        ("--network_weights", [options.network_weights] if options.network_weights else []),
        ("--base_weights", options.base_weights or []),
    ):
        for file in map(Path, files):
            if not file.is_file():
                yield f"{flag} {file}: there is no such file."
            elif file.suffix == ".safetensors":
                try:
                    read_safetensors_header(file)
                except UserError as error:
                    yield f"{flag}: {error}"
