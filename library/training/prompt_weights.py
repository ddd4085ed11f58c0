"""Weights in a caption: `(word)`, `(word:1.2)`, `[word]`, and `\\(` for a bracket that is one.

The syntax is the one of AUTOMATIC1111's web UI, which sd-scripts shares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ROUND_FACTOR = 1.1
SQUARE_FACTOR = 1 / 1.1

# An escaped character, a weight that closes a round bracket, a bracket, or text up to the next one.
# A colon that starts no weight is text; a backslash that escapes nothing is dropped.
_TOKEN = re.compile(
    r"""
    \\(?P<escaped>[\\()\[\]]?)
    | :(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\)
    | (?P<bracket>[()\[\]])
    | [^\\()\[\]:]+ | :
    """,
    re.VERBOSE,
)


@dataclass
class WeightedText:
    """A stretch of a caption and the factor of its tokens' embeddings."""

    text: str
    weight: float


def parse_weights(caption: str) -> list[WeightedText]:
    """Split a caption into stretches of equal weight. Brackets nest; an open one runs to the end.

    >>> parse_weights("a (red:1.5) cat")  # doctest: +ELLIPSIS
    [WeightedText(text='a ', weight=1.0), WeightedText(text='red', weight=1.5), ...]
    """
    stretches: list[WeightedText] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def close(start: int, factor: float) -> None:
        for stretch in stretches[start:]:
            stretch.weight *= factor

    for match in _TOKEN.finditer(caption):
        bracket, weight = match["bracket"], match["weight"]
        if bracket == "(":
            open_round.append(len(stretches))
        elif bracket == "[":
            open_square.append(len(stretches))
        elif weight is not None and open_round:
            close(open_round.pop(), float(weight))
        elif bracket == ")" and open_round:
            close(open_round.pop(), ROUND_FACTOR)
        elif bracket == "]" and open_square:
            close(open_square.pop(), SQUARE_FACTOR)
        else:
            escaped = match["escaped"]
            stretches.append(WeightedText(match[0] if escaped is None else escaped, 1.0))
    for start in open_round:
        close(start, ROUND_FACTOR)
    for start in open_square:
        close(start, SQUARE_FACTOR)
    return _merge(stretches)


def _merge(stretches: list[WeightedText]) -> list[WeightedText]:
    """Join neighbours of equal weight, so that no word is cut in two before it is tokenized."""
    merged: list[WeightedText] = []
    for stretch in stretches:
        if merged and merged[-1].weight == stretch.weight:
            merged[-1].text += stretch.text
        else:
            merged.append(stretch)
    return merged or [WeightedText("", 1.0)]
