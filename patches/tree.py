"""A folder of sd-scripts: recognised, read, and changed a file at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .anchors import ANCHORS
from .errors import Refusal
from .payload import ROOT

RECORD = "library/hina_plugin.json"
_UNFINISHED = ".hina-unfinished"


@dataclass(frozen=True)
class Tree:
    """A folder that holds sd-scripts; paths are relative to it, with forward slashes."""

    root: Path

    def read(self, path: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        file = self.root / path
        return file.read_bytes() if file.is_file() else None

    def occupied(self, path: str) -> bool:
        """Whether anything is there: a file, a folder, or a link that leads nowhere."""
        return os.path.lexists(self.root / path)

    def write(self, path: str, content: bytes) -> None:
        """Put a file in its place as a whole: it has the old content or the new, never a part.

        Raises:
            OSError: with the file's name; what was half written is gone.
        """
        file = Path(os.path.realpath(self.root / path))
        unfinished = _unfinished(file)
        try:
            unfinished.write_bytes(content)
            if file.exists():
                shutil.copymode(file, unfinished)
            _give_to_owner(unfinished, file if file.exists() else file.parent)
            os.replace(unfinished, file)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            error.filename = str(file)
            raise

    def make_folder(self, path: str) -> None:
        """Make a folder, if it is not there."""
        folder = self.root / path
        if not folder.is_dir():
            folder.mkdir()
            _give_to_owner(folder, folder.parent)

    def delete(self, path: str) -> None:
        """Remove a file, what a killed `write` left of it, and what Python compiled from it."""
        file = self.root / path
        compiled = file.parent / "__pycache__"
        leftovers = [file, _unfinished(file)]
        if file.suffix == ".py":
            leftovers += compiled.glob(f"{file.stem}.*.pyc")
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        self.delete_empty(compiled)

    def delete_empty(self, folder: str | Path) -> None:
        """Remove a folder in which nothing is left."""
        place = self.root / folder
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()

    def has_unfinished(self, path: str) -> bool:
        """Whether a `write` was killed before the file was in its place."""
        return _unfinished(Path(os.path.realpath(self.root / path))).exists()

    def forget_unfinished(self, path: str) -> None:
        """Remove what a killed `write` left beside a file that stays."""
        _unfinished(Path(os.path.realpath(self.root / path))).unlink(missing_ok=True)

    def check_places(self, paths: Iterable[str]) -> None:
        """Try whether files can be made, replaced and removed at `paths`.

        Raises:
            Refusal: a folder on the way is a link, is no folder, or cannot be written to.
        """
        folders = {parent for path in paths for parent in PurePosixPath(path).parents}
        for folder in sorted(folders):
            place = self.root / folder
            # Below library/ all folders are the plugin's own: a link would lead out of the tree.
            is_own = len(folder.parts) > 1
            if os.path.lexists(place) and (not place.is_dir() or (is_own and place.is_symlink())):
                what = "a link" if place.is_symlink() else "no folder"
                raise Refusal(
                    f"{place} is {what}; the plugin needs a folder of its own there. Nothing was "
                    "changed. Move it away and call the command again."
                )
            if place.is_dir():
                _check_writable(place)


def find_tree(target: Path) -> Tree:
    """The folder of sd-scripts that the user named; also one that has lost a file since the plugin
    was applied.

    Raises:
        Refusal: it is none, with what was looked for.
    """
    try:
        root = target.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, or `~` of nobody
        raise Refusal(f"{target}: {error}.") from error
    if not root.is_dir():
        raise Refusal(f"{root}: there is no such folder.")
    if root == ROOT or (root / "patches" / "payload.py").is_file():
        raise Refusal(
            f"{root} is this project itself, which has the optimizers: it needs no plugin. "
            "--target is the folder of your own sd-scripts."
        )
    if not _is_tree(root) and not (root / RECORD).is_file():
        missing = [anchor.file for anchor in ANCHORS if not (root / anchor.file).is_file()]
        scripts = (*root.glob("*/train_network.py"), *root.glob("*/*/train_network.py"))
        inside = [str(script.parent) for script in sorted(scripts) if _is_tree(script.parent)]
        hint = f" There is one inside: --target {' or '.join(inside)}" if inside else ""
        raise Refusal(
            f"{root} is no folder of sd-scripts: it has no {' and no '.join(missing)}.{hint}"
        )
    return Tree(root)


def _is_tree(folder: Path) -> bool:
    return all((folder / anchor.file).is_file() for anchor in ANCHORS)


def _unfinished(file: Path) -> Path:
    return file.with_name(file.name + _UNFINISHED)


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=_UNFINISHED):
            pass
    except OSError as error:
        raise Refusal(
            f"{folder}: no file can be written there ({error.strerror}). Nothing was changed. Make "
            "the folder writable, or call this as the user who owns it."
        ) from error


def _give_to_owner(new: Path, model: Path) -> None:
    """What root writes in somebody's folder is that somebody's."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        owner = model.stat()
        os.chown(new, owner.st_uid, owner.st_gid)
