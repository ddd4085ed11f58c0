"""The keys of `--network_args`: how each is read, and which module and algorithm takes which.

Values come as text from the command line (`conv_dim=4`, `train_norm=True`), as TOML's types from a
preset file, or as Python values from code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from networks.blocks import LR_WEIGHT_SHAPES


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
    """A rank for 3×3 convolutions; 0 is as if the key were not there, as in stock and LyCORIS.

    Without it stock's modules leave these layers out; `networks.kohya` takes the network's rank.
    """
    return _whole(text) or None


_whole = _number(int, 0, "a whole number, 0 for none")
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
# What one class of layers or one name may have in a preset file, beside its algorithm's keys.
LAYER_ONLY = {
    "algo": Argument(str),
    "dim": Argument(_number(int, 1, "a whole number of at least 1")),
    "alpha": Argument(_positive),
}
IA3_ONLY = {"train_on_input": Argument(_switch, False)}
# Keys that LyCORIS's modules call otherwise.
CONSTRUCTOR_NAMES = {"dora_wd": "weight_decompose", "wd_on_output": "wd_on_out"}
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


# Keys that act on a network as a whole; the others can differ from layer to layer.
_WHOLE_NETWORK = {"algo", "preset", "conv_dim", "conv_alpha", "train_norm", *LORA_PLUS, *BLOCKWISE}


def layer_keys(algorithm: str) -> dict[str, Argument]:
    """The keys that one layer's adapter takes, beside its rank and alpha."""
    uses = USES["lora" if algorithm == "locon" else algorithm]
    every = MODULES["networks.kohya"]
    keys = {key: every[key] for key in sorted(uses - _WHOLE_NETWORK)}
    return keys | (IA3_ONLY if algorithm == "ia3" else {})


def read_values(
    where: str, raw: Mapping[str, Any], names: Mapping[str, str], known: Mapping[str, Argument]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Typed values by key, the keys that are not `known`, and what is wrong with the others.

    Args:
        where: stands before a key in messages.
        names: of keys that may be given under another name, the key.
    """
    values: dict[str, Any] = {}
    unknown, problems = [], []
    for given, value in raw.items():
        key = names.get(given, given)
        if key not in known:
            unknown.append(given)
        elif value is not None:
            try:
                values[key] = known[key].read(_text(value))
            except ValueError as error:
                problems.append(f"{where}{given}={value}: must be {error}.")
    return values, unknown, problems


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).strip()


def dora_conflicts(
    where: str, algorithm: str, values: Mapping[str, Any], dropout: float | None
) -> Iterator[str]:
    """DoRA rescales the whole weight, so what acts on the adapter's output alone has no place."""
    if not values.get("dora_wd"):
        return
    conflicting = {"dropout": dropout, "bypass_mode": values.get("bypass_mode")}
    if algorithm == "lokr":
        conflicting["rank_dropout"] = values.get("rank_dropout")
    for key, value in conflicting.items():
        if value:
            yield f"{where}dora_wd=True and {key}={value} exclude each other; leave out one."
