"""The known word that a misspelt one was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is spelt most like `word`, whatever the case and the hyphens."""
    by_plain = {_plain(name): name for name in known}
    close = get_close_matches(_plain(word), by_plain, n=1, cutoff=0.6)
    return by_plain[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str], shown: str = "'{}'") -> str:
    """` Did you mean 'x'?`, to stand behind a sentence; nothing if no known word is close.

    `shown` is how the word is written, such as `--{}` for an option.
    """
    name = closest(word, known)
    return "" if name is None else f" Did you mean {shown.format(name)}?"


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
