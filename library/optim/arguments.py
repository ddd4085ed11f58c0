"""What an optimizer's arguments may be: small rules, checked before anything is built."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .spelling import did_you_mean


class OptimizerArgumentError(ValueError):
    """An optimizer argument that is unknown or impossible; the message says what is allowed."""


@dataclass(frozen=True)
class Rule:
    """What one argument may be: `holds(value)`, and the same in words."""

    holds: Callable[[Any], bool]
    allowed: str
    choices: tuple[str, ...] = ()


def plain(value: Any) -> Any:
    """Numbers of other kinds (NumPy's, tensors of one element) as Python's, also within a list or a
    tuple, which becomes a tuple; anything else as it is. A tensor's value is read now."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Rule:
    """A finite number between `low` and `high`; an open end excludes the bound itself."""

    def holds(value: object) -> bool:
        if not _is_number(value):
            return False
        above = value > low if open_low else value >= low  # type: ignore[operator]
        below = value < high if open_high else value <= high  # type: ignore[operator]
        return above and below

    left = ">" if open_low else ">="
    right = "<" if open_high else "<="
    bounds = [f"{sign} {end:g}" for sign, end in ((left, low), (right, high)) if math.isfinite(end)]
    return Rule(holds, f"a finite number {' and '.join(bounds)}".strip())


def whole_number(low: int, high: float = math.inf) -> Rule:
    """An integer from `low` to `high`."""
    upper = f" and <= {high}" if math.isfinite(high) else ""

    def holds(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return Rule(holds, f"a whole number >= {low}{upper}")


def flag() -> Rule:
    """True or False."""
    return Rule(lambda value: isinstance(value, bool), "True or False", ("True", "False"))


def one_of(*values: str | int) -> Rule:
    """One of a few fixed values."""
    return Rule(
        lambda value: not isinstance(value, bool) and value in values,
        " or ".join(map(repr, values)),
        tuple(str(value) for value in values),
    )


def several(count: int, item: Rule) -> Rule:
    """So many values, each obeying `item`."""
    words = {2: "two", 3: "three"}
    return Rule(
        lambda value: (
            isinstance(value, tuple | list) and len(value) == count and all(map(item.holds, value))
        ),
        f"{words.get(count, count)} values, each {item.allowed}",
    )


def pair(item: Rule) -> Rule:
    """Two values, each obeying `item`."""
    return several(2, item)


def check_values(rules: Mapping[str, Rule], values: Mapping[str, Any], owner: str) -> None:
    """Check `values`, made `plain`, against `rules`; keys without a rule are not looked at.

    Raises:
        OptimizerArgumentError: names the key, the value and what is allowed.
    """
    for key, value in values.items():
        rule = rules.get(key)
        if rule is not None and not rule.holds(plain(value)):
            hint = did_you_mean(value, rule.choices) if isinstance(value, str) else ""
            raise OptimizerArgumentError(
                f"{owner}: {key}={value!r} is not possible; {key} must be {rule.allowed}.{hint}"
            )


def check_keys(known: list[str], values: Mapping[str, Any], owner: str) -> None:
    """Refuse a key that `owner` does not take.

    Raises:
        OptimizerArgumentError: names the key, the nearest spelling and all that is allowed.
    """
    for key, value in values.items():
        if key not in known:
            raise OptimizerArgumentError(
                f"{owner} has no argument '{key}' (given {key}={value!r})."
                f"{did_you_mean(key, known)} Allowed: {', '.join(sorted(known))}."
            )


def check_groupable(
    rules: Mapping[str, Rule], own: Mapping[str, Any], group: Mapping[str, Any], owner: str
) -> None:
    """Refuse an argument of `owner` in a parameter group, but for those that a group has of its
    `own`: it would be kept there and do nothing.

    Raises:
        OptimizerArgumentError: names the key, and says what a group may set.
    """
    for key, value in group.items():
        if key in rules and key not in own:
            raise OptimizerArgumentError(
                f"{owner}: '{key}' acts on all parameters and cannot be set in a parameter group, "
                f"which may set {', '.join(own)}. Give it to the optimizer, {owner}(…, "
                f"{key}={value!r}), or make a second optimizer for that group's parameters."
            )
