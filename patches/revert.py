"""Taking the plugin out: first the lines that use its files, then the files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace

from .anchors import ANCHORS, remove
from .errors import Refusal
from .record import PATH, Record, read_record, sha256, write_record
from .tree import Tree


def revert(tree: Tree) -> list[str] | None:
    """Take out whatever of the plugin is there.

    Returns:
        the files that the user has edited besides, and that keep those edits; None if there was
        nothing to take out.

    Raises:
        Refusal: the user has edited what would be removed, or a file cannot be written.
    """
    record = read_record(tree)
    tree.forget_unfinished(PATH)
    stock = without_lines(tree, record)
    marked = [path for path, content in stock.items() if tree.read(path) != content]
    if record is None and not marked:
        return None
    if record is None:
        tree.check_writable(marked)
        _restore(tree, stock)
        return []
    edited = edited_copies(tree, record)
    if edited:
        raise Refusal(
            f"{tree.root / edited[0]} was edited since the plugin put it there"
            f"{f', and so were {len(edited) - 1} more' if edited[1:] else ''}; revert would delete "
            "it. Nothing was changed. Move your version away or delete it, and call revert again."
        )
    tree.check_writable([PATH, *record.copied, *record.edited])
    take_out(tree, record)
    return [
        path
        for path, edit in record.edited.items()
        if path in stock and sha256(stock[path]) != edit.before
    ]


def take_out(tree: Tree, record: Record) -> None:
    """Undo what `record` tells, as far as it was done; the record itself goes last."""
    write_record(tree, replace(record, state="changing"))
    _restore(tree, without_lines(tree, record))
    for path in record.copied:
        tree.delete(path)
    for folder in reversed(record.folders):
        shutil.rmtree(tree.root / folder / "__pycache__", ignore_errors=True)
        if (tree.root / folder).is_dir() and not any((tree.root / folder).iterdir()):
            (tree.root / folder).rmdir()
    tree.delete(PATH)


def without_lines(tree: Tree, record: Record | None) -> dict[str, bytes]:
    """Stock's files that the plugin edits, without its lines, whether these are there or not; by
    path, the last one edited first. Without a record, the lines of this version are known."""
    lines: dict[str, list[str]] = {anchor.file: anchor.marked for anchor in ANCHORS}
    if record is not None:
        lines = {**lines, **{path: edit.lines for path, edit in record.edited.items()}}
    contents = {path: tree.read(path) for path in reversed(lines)}
    return {
        path: remove(path, content, lines[path])
        for path, content in contents.items()
        if content is not None
    }


def edited_copies(tree: Tree, record: Record) -> list[str]:
    """The plugin's files in the folder that are no longer as it put them there."""
    contents = {path: tree.read(path) for path in record.copied}
    return [
        path
        for path, content in contents.items()
        if content is not None and sha256(content) != record.copied[path]
    ]


def _restore(tree: Tree, stock: Mapping[str, bytes]) -> None:
    for path, content in stock.items():
        if tree.read(path) != content:
            tree.write(path, content)
        tree.forget_unfinished(path)
