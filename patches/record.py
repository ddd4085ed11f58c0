"""What the plugin has done to a folder, written there before it is begun.

The record is the first file to come and the last to go: a folder without one is stock's, and one
that was left in the middle can be put right by whoever reads it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from .errors import Refusal
from .tree import Tree

PATH = "library/hina_plugin.json"


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
        Refusal: there is one that cannot be read.
    """
    content = tree.read(PATH)
    if content is None:
        return None
    try:
        values = json.loads(content)
        edited = {path: Edit(**edit) for path, edit in values.pop("edited").items()}
        return Record(**values, edited=edited)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refusal(
            f"{tree.root / PATH}, which tells what the plugin has done here, cannot be read "
            f"({error}). Get it back from a copy. Without one: delete it, all lines that end with "
            "the plugin's mark '# hina-plugin', and the files it copied (library/hina_plugin.py, "
            "library/custom_*_optimizer.py, library/optim)."
        ) from error


def write_record(tree: Tree, record: Record) -> None:
    """Write it in place of the one before, at once."""
    tree.write(PATH, json.dumps(asdict(record), indent=1).encode() + b"\n")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
