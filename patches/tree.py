"""A folder of sd-scripts: recognised, read, and changed a file at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .anchors import ANCHORS
from .errors import Refusal
from .payload import ROOT

_UNFINISHED = ".hina-unfinished"


@dataclass(frozen=True)
class Tree:
    """A folder that holds sd-scripts; paths are relative to it, with forward slashes."""

    root: Path

    def read(self, path: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        file = self.root / path
        return file.read_bytes() if file.is_file() else None

    def write(self, path: str, content: bytes) -> None:
        """Put a file in its place as a whole: it has the old content or the new, never a part."""
        file = Path(os.path.realpath(self.root / path))
        unfinished = file.with_name(file.name + _UNFINISHED)
        unfinished.write_bytes(content)
        if file.exists():
            shutil.copymode(file, unfinished)
        os.replace(unfinished, file)

    def delete(self, path: str) -> None:
        """Remove a file, what a killed `write` left of it, and what Python compiled from it."""
        file = self.root / path
        compiled = file.parent / "__pycache__"
        leftovers = [file, file.with_name(file.name + _UNFINISHED)]
        if file.suffix == ".py":
            leftovers += compiled.glob(f"{file.stem}.*.pyc")
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        if compiled.is_dir() and not any(compiled.iterdir()):
            compiled.rmdir()

    def forget_unfinished(self, path: str) -> None:
        """Remove what a killed `write` left beside a file that stays."""
        file = Path(os.path.realpath(self.root / path))
        file.with_name(file.name + _UNFINISHED).unlink(missing_ok=True)

    def check_writable(self, paths: Iterable[str]) -> None:
        """Try whether files can be made, replaced and removed where `paths` are to be.

        Raises:
            Refusal: names the folder or file that does not allow it.
        """
        existing = {self._nearest_folder(path) for path in paths}
        for folder in sorted(existing):
            try:
                with tempfile.NamedTemporaryFile(dir=folder, suffix=_UNFINISHED):
                    pass
            except OSError as error:
                raise Refusal(
                    f"{folder}: no file can be written there ({error.strerror}). Nothing was "
                    "changed. Make the folder writable, or call this as the user who owns it."
                ) from error

    def _nearest_folder(self, path: str) -> Path:
        folder = Path(os.path.realpath(self.root / path)).parent
        return next(each for each in (folder, *folder.parents) if each.is_dir())


def find_tree(target: Path) -> Tree:
    """The folder of sd-scripts that the user named.

    Raises:
        Refusal: it is none, with what was looked for.
    """
    root = target.expanduser().resolve()
    if not root.is_dir():
        raise Refusal(f"{root}: there is no such folder.")
    if root == ROOT:
        raise Refusal(
            f"{root} is this project itself, which has the optimizers: it needs no plugin. "
            "--target is the folder of your own sd-scripts."
        )
    missing = [anchor.file for anchor in ANCHORS if not (root / anchor.file).is_file()]
    if missing:
        scripts = (*root.glob("*/train_network.py"), *root.glob("*/*/train_network.py"))
        inside = [str(script.parent) for script in sorted(scripts) if _is_tree(script.parent)]
        hint = f" There is one inside: --target {' or '.join(inside)}" if inside else ""
        raise Refusal(
            f"{root} is no folder of sd-scripts: it has no {' and no '.join(missing)}.{hint}"
        )
    return Tree(root)


def _is_tree(folder: Path) -> bool:
    return all((folder / anchor.file).is_file() for anchor in ANCHORS)
