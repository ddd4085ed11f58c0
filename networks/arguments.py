"""`--network_args` of our network modules, read and checked.

Everything wrong is found at once and before torch is imported: this file is read while a run is
checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from networks.blocks import LR_WEIGHTS, NUM_BLOCKS
from networks.keys import (
    ALGORITHM_OF,
    ALIASES,
    MODULES,
    REFUSED_ALGORITHMS,
    USES,
    dora_conflicts,
    read_values,
)
from networks.presets import ALGORITHMS, check_preset


@dataclass
class NetworkArguments:
    """What a network is made of: ranks and scales, and `options`, the keys that were given."""

    algorithm: str
    dim: int
    alpha: float
    conv_dim: int | None
    conv_alpha: float
    dropout: float
    options: dict[str, Any] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """The key's value, or the one that asks for nothing."""
        for arguments in MODULES.values():
            if key in arguments:
                return self.options.get(key, arguments[key].off)
        raise KeyError(key)


def read_arguments(
    module: str,
    network_dim: int | None,
    network_alpha: float | None,
    neuron_dropout: float | None,
    raw: Mapping[str, Any],
) -> NetworkArguments:
    """The arguments of `create_network`, typed; UserError that lists all that is wrong.

    No `network_dim` is rank 4, no `network_alpha` is 1 and alpha 0 means alpha = rank, as in stock.
    """
    problems = check_numbers(network_dim, network_alpha, neuron_dropout)
    options, wrong = _read(module, raw)
    problems += wrong or _combinations(module, options, neuron_dropout)
    if problems:
        raise UserError.listing(problems)
    dim = 4 if network_dim is None else network_dim
    alpha = 1.0 if network_alpha is None else float(network_alpha)
    lycoris = module == "networks.kohya"
    conv_alpha = options.get("conv_alpha")
    if conv_alpha is None or (lycoris and not conv_alpha):
        conv_alpha = alpha if lycoris else 1.0
    return NetworkArguments(
        algorithm=_algorithm(module, options),
        dim=dim,
        alpha=alpha,
        conv_dim=options.get("conv_dim") or (dim if lycoris else None),
        conv_alpha=conv_alpha,
        dropout=options.get("dropout", neuron_dropout or 0.0),
        options=options,
    )


def check_arguments(
    module: str, raw: Mapping[str, Any], neuron_dropout: float | None = None
) -> list[str]:
    """What is wrong with the network arguments, in words for the user."""
    options, problems = _read(module, raw)
    return problems or _combinations(module, options, neuron_dropout)


def check_numbers(
    network_dim: int | None, network_alpha: float | None, neuron_dropout: float | None
) -> list[str]:
    """What is wrong with `--network_dim`, `--network_alpha` and `--network_dropout`."""
    problems = []
    if network_dim is not None and network_dim < 1:
        problems.append(f"--network_dim {network_dim}: the rank must be a whole number from 1 on.")
    if network_alpha is not None and not 0 <= network_alpha < float("inf"):
        problems.append(f"--network_alpha {network_alpha}: must be at least 0; 0 means the rank.")
    if neuron_dropout is not None and not 0 <= neuron_dropout < 1:
        problems.append(f"--network_dropout {neuron_dropout}: must be at least 0 and less than 1.")
    return problems


def _read(module: str, raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    options, unknown, problems = read_values("--network_args ", raw, ALIASES, MODULES[module])
    return options, [*(_unknown(module, key) for key in unknown), *problems]


def _unknown(module: str, key: str) -> str:
    if key == "disable_conv_cp":
        return "--network_args disable_conv_cp: write use_tucker=True or use_tucker=False instead."
    elsewhere = [name for name, arguments in MODULES.items() if key in arguments]
    if elsewhere:
        return f"--network_args {key}: {module} has no such key, {' and '.join(elsewhere)} has."
    known = list(MODULES[module])
    hint = did_you_mean(key, known) or f" Known keys: {', '.join(sorted(known))}."
    return f"--network_args {key}: {module} has no such key.{hint}"


def _algorithm(module: str, options: Mapping[str, Any]) -> str:
    name = ALGORITHM_OF.get(module) or options.get("algo", "lora")
    return "lora" if name == "locon" else str(name)


def _combinations(
    module: str, options: Mapping[str, Any], neuron_dropout: float | None
) -> list[str]:
    """Keys that are right alone and wrong together."""
    algorithm = _algorithm(module, options)
    if algorithm in REFUSED_ALGORITHMS:
        return [f"--network_args algo={algorithm} is refused: {REFUSED_ALGORITHMS[algorithm]}."]
    if algorithm not in USES:
        allowed = ", ".join(ALGORITHMS)
        hint = did_you_mean(algorithm, ALGORITHMS)
        return [f"--network_args algo={algorithm}: choose from {allowed}.{hint}"]
    known = MODULES[module]
    problems = [
        f"--network_args {key}={value}: {algorithm} has no use for it; leave it out."
        for key, value in options.items()
        if key not in USES[algorithm] and value != known[key].off
    ]
    dropout = options.get("dropout", neuron_dropout)
    if dropout and "dropout" not in USES[algorithm]:
        if not options.get("dropout"):
            problems.append(f"--network_dropout {dropout}: {algorithm} has none; leave it out.")
    else:
        problems += dora_conflicts("--network_args ", algorithm, options, dropout)
    if "preset" in options:
        problems += check_preset(options["preset"], algorithm, {**options, "dropout": dropout})
    return problems + _blockwise(options)


def _blockwise(options: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
        if key in options and len(options[key]) not in NUM_BLOCKS.values():
            problems.append(
                f"--network_args {key}: {len(options[key])} numbers; SD 1.x and 2.x have "
                f"{NUM_BLOCKS['sd']} blocks, SDXL has {NUM_BLOCKS['sdxl']}."
            )
    by_block = any(key in options for key in ("block_dims", *LR_WEIGHTS[:3]))
    for key, needed in (
        ("block_alphas", by_block),
        ("conv_block_dims", by_block),
        ("conv_block_alphas", by_block and "conv_block_dims" in options),
    ):
        if key in options and not needed:
            base = "conv_block_dims" if key == "conv_block_alphas" else "block_dims"
            problems.append(f"--network_args {key} acts only together with {base}; add {base}.")
    return problems
