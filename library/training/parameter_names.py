"""What figures call parameters: the module they belong to, their kind, and their block."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from library.optim.roles import REGULAR, parse_name

MOST_BLOCKS = 24  # more cannot be labelled in one picture
_MANY = 6  # numbered blocks of one stem that may be taken together, if there are too many in all
_NUMBERED = re.compile(r"(.*?)[._](\d+)(?=[._]|$)")
_OF_ANY_MODULE = ("weight", "bias")


def kind(name: str) -> str:
    """What of a module the parameter is: an adapter's role (`lora_a`), else the last word of its
    name that tells something (`conv1` of `blocks.3.conv1.weight`); "" without a name."""
    slot = parse_name(name).slot
    if slot != REGULAR:
        return slot
    words = [word for word in name.split(".") if word not in _OF_ANY_MODULE and not word.isdigit()]
    return words[-1] if words else ""


def module(name: str) -> str:
    """The module whose parameter it is; both halves of a LoRA have the same."""
    base = parse_name(name).base
    head, _, last = base.rpartition(".")
    return head if head and last in _OF_ANY_MODULE else base


def blocks(names: Sequence[str]) -> list[str]:
    """The block of each parameter: its name up to the first number, without what all have in
    common. Where that makes more than `MOST_BLOCKS`, long rows of numbered blocks count as one.
    Parameters without names are counted off in tens, hundreds, …"""
    if not any(names):
        return _counted(len(names))
    parts = [_split(module(name)) for name in names]
    numbers: dict[str, set[str]] = defaultdict(set)
    for stem, number in parts:
        numbers[stem].add(number)
    if sum(map(len, numbers.values())) > MOST_BLOCKS:
        parts = [(stem, number if len(numbers[stem]) <= _MANY else "") for stem, number in parts]
    cut = _length_in_common({stem for stem, _ in parts})
    return [f"{stem[cut:]} {number}".strip() for stem, number in parts]


def _length_in_common(stems: set[str]) -> int:
    """The letters of the whole words that all begin with; none where there is only one."""
    first, last = min(stems), max(stems)  # what these two share all between them share
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    common = first[:same] if len(stems) > 1 else ""
    return max(common.rfind("."), common.rfind("_")) + 1


def _split(path: str) -> tuple[str, str]:
    """A module's path up to its first number, and the number."""
    numbered = _NUMBERED.match(path)
    return (numbered[1], numbered[2]) if numbered else (path.split(".")[0], "")


def _counted(count: int) -> list[str]:
    size = 10
    while count > size * MOST_BLOCKS:
        size *= 10
    starts = [index - index % size for index in range(count)]
    return [f"{start} to {min(start + size, count) - 1}" for start in starts]
