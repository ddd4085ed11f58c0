"""TOML files: read with errors a user can act on, written without a dependency."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from library.training.config_text import read_toml

__all__ = ["read_toml", "write_toml"]


def write_toml(path: Path, values: Iterable[tuple[str, Any]], comment: str) -> None:
    """Write `values` (text, numbers, booleans, lists of them) as one flat table."""
    lines = [f"# {comment}", *(f"{key} = {_literal(value)}" for key, value in values)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_literal(item) for item in value)}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
