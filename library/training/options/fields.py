"""What an option is: a dataclass field that carries its command line with it."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

_KIND_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    Path: "text in quotes",
}


@dataclass(frozen=True)
class Option:
    """One option of the command line, read off a field and its annotation."""

    name: str
    topic: str
    default: Any
    kind: Callable[[str], Any]  # turns one word of the command line into a value; bool for a flag
    many: bool  # takes any number of values
    help: str
    choices: Sequence[Any] | None = None
    explain: Mapping[Any, str] = field(default_factory=dict)  # why a value is not among `choices`
    path: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def expected(self) -> str:
        """The kind of value in words, for messages about config files."""
        one = _KIND_NAMES.get(self.kind, "a number of steps, or a ratio below 1")
        return f"a list, each {one}" if self.many else one

    def show(self, value: Any) -> str:
        """The option with `value`, as it would be typed."""
        if self.kind is bool:
            return self.flag
        words = value if isinstance(value, list) else [value]
        return " ".join([self.flag, *(_quoted(word) for word in words)])

    def range_problem(self, value: Any) -> str | None:
        """What is impossible about `value`, if its number is out of range (NaN always is)."""
        if value is None or (self.low is None and self.high is None and self.above is None):
            return None
        numbers = value if isinstance(value, list) else [value]
        if all(self._in_range(number) for number in numbers):
            return None
        return f"{self.show(value)}: must be {self._range_text()}"

    def _in_range(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
        )

    def _range_text(self) -> str:
        if self.above is not None:
            return f"greater than {self.above:g}"
        if self.low is not None and self.high is not None:
            return f"between {self.low:g} and {self.high:g}"
        return f"{self.low:g} or more"

    def choice_problem(self, value: Any) -> str | None:
        """Why `value` cannot be chosen, with the nearest or all of the possible values."""
        if self.choices is None or value == self.default or value in self.choices:
            return None
        if value in self.explain:
            return f"{self.show(value)}: {self.explain[value]}"
        known = [str(choice) for choice in self.choices if choice is not None]
        return f"{self.show(value)}: choose one of {', '.join(known)}"


def option(
    default: T,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    explain: Mapping[Any, str] | None = None,
    parse: Callable[[str], Any] | None = None,
    path: bool = False,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> T:
    """A dataclass field that is an option.

    Its kind comes from the annotation (`bool` is a flag, `list[…]` takes any number of values)
    unless `parse` says otherwise. `low` and `high` are the bounds of a sensible value, both
    included, `above` one that is not; they are checked before a run, not by the parser.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "explain": explain or {},
        "parse": parse,
        "path": path,
        "low": low,
        "high": high,
        "above": above,
    }
    result: T = field(default=default, metadata=metadata)
    return result


def read_options(topics: Sequence[type]) -> dict[str, Option]:
    """The options of `topics` (dataclasses whose docstring's first line is a heading), by name."""
    options: dict[str, Option] = {}
    for topic in topics:
        hints = get_type_hints(topic)
        heading = (topic.__doc__ or "").splitlines()[0].rstrip(".")
        for item in dataclasses.fields(topic):
            metadata = dict(item.metadata)
            kind, many = _kind_of(hints[item.name])
            kind = metadata.pop("parse") or kind
            options[item.name] = Option(
                name=item.name,
                topic=heading,
                default=item.default,
                kind=kind,
                many=many,
                **metadata,
            )
    return options


def _kind_of(annotation: Any) -> tuple[Any, bool]:
    """(kind, many) of `str | None`, `list[float] | None`, `bool`, …"""
    arguments = [argument for argument in get_args(annotation) if argument is not NoneType]
    if get_origin(annotation) is list:
        return arguments[0], True
    return _kind_of(arguments[0]) if arguments else (annotation, False)


def int_or_float(word: str) -> int | float:
    """A number of steps (`500`) or a ratio of all steps (`0.05`, `5%`), as in stock."""
    try:
        if word.endswith("%"):
            return float(word[:-1]) / 100
        number = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{word!r} is neither a number of steps nor a ratio"
        ) from None
    return steps_or_ratio(number)


def steps_or_ratio(number: float) -> int | float:
    """Whole numbers from 1 on are steps, numbers below 1 are a ratio; 1.5 is neither."""
    if isinstance(number, int) or not math.isfinite(number) or number < 1:
        return number
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{number:g} is neither a whole number nor below 1")
    return int(number)


def _quoted(word: Any) -> str:
    text = str(word)
    return f'"{text}"' if not text or " " in text else text
