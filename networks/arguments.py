"""`--network_args` of our network modules: names, types, and which algorithm uses which.

Values come as text from the command line (`conv_dim=4`, `train_norm=True`) or as Python values from
code. Everything wrong is found at once and before torch is imported: this file is read while a run
is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from networks.blocks import LR_WEIGHT_SHAPES, LR_WEIGHTS, NUM_BLOCKS
from networks.presets import ALGORITHMS, check_preset


@dataclass(frozen=True)
class Argument:
    """One key: how its text is read, and the value that asks for nothing.

    Launchers write every key they know, so a key that an algorithm has no use for is refused only
    when it is set to something else than `off`.
    """

    read: Callable[[str], Any]
    off: Any = None


def _switch(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError("True or False")
    return words[text.lower()]


def _numbers(kind: type, least: float, allowed: str) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        return [_number(kind, least, allowed)(part.strip()) for part in text.split(",")]

    return read


def _number(
    kind: type, least: float, allowed: str, below: float = float("inf")
) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(allowed) from None
        if not least <= value < below:
            raise ValueError(allowed)
        return value

    return read


def _lr_weights(text: str) -> str | list[float]:
    """A named course over the blocks, with `+base` behind if wanted, or numbers (empty is 0)."""
    name, _, base = text.partition("+")
    allowed = (
        f"numbers with commas, or one of {', '.join(LR_WEIGHT_SHAPES)} (then +number if wanted)"
    )
    try:
        if name in LR_WEIGHT_SHAPES:
            float(base or 0)
            return text
        return [float(part) if part.strip() else 0.0 for part in text.split(",")]
    except ValueError:
        raise ValueError(allowed) from None


def _optional_rank(text: str) -> int | None:
    """A rank for 3×3 convolutions; 0 leaves them out, as if the key were not there."""
    return _rank_or_none(text) or None


_rank_or_none = _number(int, 0, "a whole number, 0 for none")
_fraction = _number(float, 0, "a number from 0 up to, not including, 1", below=1)
_positive = _number(float, 0, "a number of at least 0")
_ranks = _numbers(int, 0, "whole numbers with commas, one a block")
_alphas = _numbers(float, 0, "numbers with commas, one a block")

SHARED = {
    "conv_dim": Argument(_optional_rank),
    "conv_alpha": Argument(_positive),
    "dropout": Argument(_fraction, 0.0),
    "rank_dropout": Argument(_fraction, 0.0),
    "module_dropout": Argument(_fraction, 0.0),
    "use_tucker": Argument(_switch, False),
    "use_scalar": Argument(_switch, False),
    "dora_wd": Argument(_switch, False),
    "wd_on_output": Argument(_switch, True),
    "rs_lora": Argument(_switch, False),
    "train_norm": Argument(_switch, False),
    "bypass_mode": Argument(_switch, False),
    "rank_dropout_scale": Argument(_switch, False),
}
BLOCKWISE = {
    "block_dims": Argument(_ranks),
    "block_alphas": Argument(_alphas),
    "conv_block_dims": Argument(_ranks),
    "conv_block_alphas": Argument(_alphas),
    "down_lr_weight": Argument(_lr_weights),
    "mid_lr_weight": Argument(_numbers(float, float("-inf"), "numbers with commas")),
    "up_lr_weight": Argument(_lr_weights),
    "block_lr_zero_threshold": Argument(_positive, 0.0),
}
LORA_PLUS = {
    "loraplus_lr_ratio": Argument(_positive),
    "loraplus_unet_lr_ratio": Argument(_positive),
    "loraplus_text_encoder_lr_ratio": Argument(_positive),
}
KRONECKER = {
    "factor": Argument(_number(int, -1, "a whole number, -1 for the most square one"), -1),
    "decompose_both": Argument(_switch, False),
    "full_matrix": Argument(_switch, False),
    "unbalanced_factorization": Argument(_switch, False),
}
LYCORIS_ONLY = {
    "algo": Argument(str.lower),
    "preset": Argument(str),
    "constraint": Argument(_positive, 0.0),
    "rescaled": Argument(_switch, False),
    "block_size": Argument(_number(int, 1, "a whole number of at least 1"), 4),
    "train_t5xxl": Argument(_switch, False),
    "train_llm_adapter": Argument(_switch, False),
}
# Older spellings of LyCORIS.
ALIASES = {"use_cp": "use_tucker", "use_conv_cp": "use_tucker", "constrain": "constraint"}

MODULES: dict[str, dict[str, Argument]] = {
    "networks.lora": SHARED | BLOCKWISE | LORA_PLUS,
    "networks.loha": SHARED | BLOCKWISE,
    "networks.lokr": SHARED | BLOCKWISE | KRONECKER,
    "networks.kohya": SHARED | LORA_PLUS | KRONECKER | LYCORIS_ONLY,
}

_ALWAYS = {"algo", "preset", "conv_dim", "conv_alpha", "module_dropout", "train_norm"}
_LOW_RANK = {
    "dropout",
    "rank_dropout",
    "use_tucker",
    "use_scalar",
    "dora_wd",
    "wd_on_output",
    "rs_lora",
    "bypass_mode",
}
# What each algorithm of lycoris-lora really reads; its create_network takes the rest in silence.
USES: dict[str, set[str]] = {
    "lora": _ALWAYS | _LOW_RANK | set(LORA_PLUS) | set(BLOCKWISE),
    "loha": _ALWAYS | _LOW_RANK | set(BLOCKWISE),
    "lokr": _ALWAYS | _LOW_RANK | set(KRONECKER) | set(BLOCKWISE),
    "full": _ALWAYS | {"rank_dropout"},
    "glora": _ALWAYS | {"use_scalar"},
    "diag-oft": _ALWAYS | {"constraint", "rescaled"},
    "boft": _ALWAYS | {"constraint", "rescaled"},
    "ia3": _ALWAYS,
}
REFUSED_ALGORITHMS = {
    "dylora": "lycoris-lora draws a random rank in sampling too and writes files that other tools "
    "scale differently from what was trained. algo=lora is the way round: its files can be resized",
    "tlora": "it masks ranks by timestep, and lycoris-lora can do that for one timestep a batch "
    "only. algo=lora is the way round",
}
ALGORITHM_OF = {"networks.lora": "lora", "networks.loha": "loha", "networks.lokr": "lokr"}


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
        alpha=alpha or float(dim),
        conv_dim=options.get("conv_dim", dim if lycoris else None),
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
    known = MODULES[module]
    options: dict[str, Any] = {}
    problems = []
    for given, value in raw.items():
        key = ALIASES.get(given, given)
        if key not in known:
            problems.append(_unknown(module, given))
            continue
        if value is None:
            continue
        try:
            options[key] = known[key].read(_text(value))
        except ValueError as error:
            problems.append(f"--network_args {given}={value}: must be {error}.")
    return options, problems


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).strip()


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
    elif options.get("dora_wd"):
        problems += _dora(algorithm, options, dropout)
    if "preset" in options:
        problems += check_preset(options["preset"])
    return problems + _blockwise(options)


def _dora(algorithm: str, options: Mapping[str, Any], dropout: float | None) -> list[str]:
    """DoRA rescales the whole weight, so what acts on the adapter's output alone has no place."""
    conflicting = {"dropout": dropout, "bypass_mode": options.get("bypass_mode")}
    if algorithm == "lokr":
        conflicting["rank_dropout"] = options.get("rank_dropout")
    return [
        f"--network_args dora_wd=True and {key}={value} exclude each other; leave out one."
        for key, value in conflicting.items()
        if value
    ]


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
