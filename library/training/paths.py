"""Paths as people type them, and what can be said about a path before it is used."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from library.optim.spelling import closest
from library.training.options import Option


def clean_path(text: str) -> str | None:
    """The path that was meant: without quotes around it, with `~` resolved, None if it is empty.

    Trailing separators go; so does a lone closing quote, which Windows shells leave behind after
    `"C:\\folder\\"`.
    """
    path = text.strip()
    while len(path) >= 2 and path[0] in "\"'" and path[0] == path[-1]:
        path = path[1:-1].strip()
    if path.count('"') == 1 and path.endswith('"'):
        path = path[:-1]
    path = os.path.expanduser(path)
    if not os.path.lexists(path):
        shorter = path.rstrip("/\\")
        path = shorter if shorter and not shorter.endswith(":") else path
    return path or None


def quote_problem(option: Option, path: str) -> str | None:
    """Windows shells take `"C:\\folder\\" --next 1` for one word, the path and what follows it."""
    if '"' not in path:
        return None
    return (
        f"{option.flag} {path}: there is a quotation mark inside the path. A backslash before the "
        "closing quote swallows it: leave the last backslash out."
    )


def missing(flag: str, path: str, kind: str = "file or folder") -> str:
    """The message for a path that does not exist, with the name nearby that may have been meant."""
    message = f"{flag} {path}: there is no such {kind}."
    whole = Path(path)
    for part in [whole, *whole.parents]:
        if part.parent.is_dir() and not part.exists():
            try:
                names = os.listdir(part.parent)
            except OSError:
                break
            found = closest(part.name, names)
            if found is not None:
                return f"{message} Did you mean {part.parent / found}?"
            if part != whole:
                return f"{message} {part.parent} has no folder {part.name}."
            break
    if path.lower() in ("none", "null"):
        return f"{message} To go without it, leave the option out."
    return message


def exists(option: Option, path: str, test: Callable[[Path], bool], kind: str) -> list[str]:
    """A line if `test` fails on the path, for `[]` or one problem."""
    try:
        return [] if test(Path(path)) else [missing(option.flag, path, kind)]
    except OSError as error:  # a name that is too long, a drive that is not ready
        return [f"{option.flag} {path}: {error.strerror}."]


def folder_problem(flag: str, path: str) -> str | None:
    """Why files cannot be written to the folder `path`, which need not exist yet.

    Nothing is left behind: an unnamed file is written to the folder, or to the nearest one above
    it that exists. The folder itself is made when there is something to put into it.
    """
    try:
        nearest = next(p for p in [Path(path), *Path(path).absolute().parents] if p.exists())
        if not nearest.is_dir():
            return f"{flag} {path}: {nearest} is a file, so there can be no folder of that name."
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(b"\0")
    except OSError as error:
        return f"{flag} {path}: cannot be written to ({error.strerror}). Choose another folder."
    return None
