"""What the plugin has done to a folder, written there before it is begun.

The record is the first file to come and the last to go: a folder without one is stock's, and one
that was left in the middle can be put right by whoever reads it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import Refusal
from .tree import RECORD, Tree

FORMAT = 1


@dataclass(frozen=True)
class Edit:
    """Lines that were put into a file of stock's; `before` and `after` are SHA-256 sums."""

    lines: list[str]
    before: str
    after: str


@dataclass(frozen=True)
class Record:
    """What lies in the folder because of the plugin.

    Attributes:
        version: see `payload.version_of`.
        state: `changing` from before the first change until after the last one.
        copied: SHA-256 sums by path.
        edited: by path.
        folders: that were made for copies, outer ones first.
    """

    version: str
    state: Literal["changing", "applied"]
    copied: dict[str, str]
    edited: dict[str, Edit]
    folders: list[str]


def read_record(tree: Tree) -> Record | None:
    """The folder's record; None where the plugin is not.

    Raises:
        Refusal: there is one that cannot be read, or that a newer plugin has written.
    """
    if not tree.occupied(RECORD):
        return None
    content = tree.read(RECORD)
    try:
        values = json.loads(content or b"")
        newer = values["format"] > FORMAT
        record = None if newer else _record(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refusal(
            f"{tree.root / RECORD}, which tells what the plugin has done here, cannot be read "
            f"({error}). Get it back from a copy. Without one: delete it, all lines that end with "
            "the plugin's mark '# hina-plugin', and the files it copied (library/hina_plugin.py, "
            "library/custom_*_optimizer.py, library/optim)."
        ) from error
    if record is None:
        raise Refusal(
            f"{tree.root}: a newer plugin was applied here, {values.get('version')}. Use that one, "
            "or update this."
        )
    return record


def _record(values: dict[str, Any]) -> Record:
    return Record(
        version=str(values["version"]),
        state=values["state"],
        copied=dict(values["copied"]),
        edited={path: Edit(**edit) for path, edit in values["edited"].items()},
        folders=list(values["folders"]),
    )


def write_record(tree: Tree, record: Record) -> None:
    """Write it in place of the one before, at once."""
    values = {"format": FORMAT, **asdict(record)}
    tree.write(RECORD, json.dumps(values, indent=1).encode() + b"\n")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
