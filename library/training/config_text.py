"""Reading TOML and JSON files written by hand: a mistake is told with file, line and column."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from library.training.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, with or without a byte-order mark; UserError says what is wrong."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file (looked from {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start + 1}): save it as UTF-8 in your editor"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_table(path: Path) -> dict[str, Any]:
    """The content of a .toml or .json file, which must be a table of named values."""
    readers = {".toml": read_toml, ".json": read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: must end in .toml or .json")
    table = reader(path)
    if not isinstance(table, dict):
        raise UserError(f"{path}: must hold a table of named values, not {type(table).__name__}")
    return table


def read_toml(path: Path) -> dict[str, Any]:
    """A parsed TOML file."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, line, column = _toml_position(str(error), text)
    place = text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
    hint = ""
    if "\\" in place and '"' in place:
        hint = "\nA path with \\ in it needs single quotes: 'C:\\pictures'"
    raise UserError(f"{path}:{line}:{column}: {message}\n    {place.strip()}{hint}")


def _toml_position(message: str, text: str) -> tuple[str, int, int]:
    """What the parser complains of, its line and its column, both counted from 1."""
    found = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    if found:
        return message[: found.start()], int(found[1]), int(found[2])
    lines = text.splitlines() or [""]
    return message.removesuffix(" (at end of document)"), len(lines), len(lines[-1]) + 1


def read_json(path: Path) -> Any:
    """A parsed JSON file."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str, line: int = 1) -> Any:
    """Parsed JSON; `where` and the number of the text's first `line` are for the message."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        position = f"{where}:{line + error.lineno - 1}:{error.colno}"
        raise UserError(f"{position}: {error.msg}") from None
