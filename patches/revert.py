"""Taking the plugin out: first the lines that use its files, then the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .anchors import ANCHORS, remove
from .errors import Refusal
from .record import Record, read_record, sha256, write_record
from .tree import RECORD, Tree


def revert(tree: Tree) -> list[str] | None:
    """Take out whatever of the plugin is there.

    Returns:
        the files that the user has edited besides, and that keep those edits; None if there was
        nothing to take out.

    Raises:
        Refusal: the user has edited what would be removed, or a file cannot be written.
    """
    record = read_record(tree)
    stock = without_lines(tree, record)
    marked = [path for path, content in stock.items() if tree.read(path) != content]
    if record is None:
        tree.forget_unfinished(RECORD)
        if not marked:
            return None
        tree.check_places(marked)
        _restore(tree, stock)
        return []
    tree.check_places([RECORD, *record.copied, *stock])
    refuse_edited(tree, record, "revert would delete it")
    take_out(tree, record)
    return [
        path
        for path, edit in record.edited.items()
        if path in stock and sha256(stock[path]) != edit.before
    ]


def take_out(tree: Tree, record: Record) -> None:
    """Undo what `record` tells, as far as it was done; the record itself goes last."""
    if record.state != "changing":
        write_record(tree, replace(record, state="changing"))
    _restore(tree, without_lines(tree, record))
    for path in record.copied:
        tree.delete(path)
    for folder in reversed(record.folders):
        tree.delete_empty(folder)
    tree.delete(RECORD)


def without_lines(tree: Tree, record: Record | None) -> dict[str, bytes]:
    """Stock's files that the plugin edits, without its lines, whether these are there or not; by
    path, the last one edited first. Without a record, the lines of this version are known.

    Raises:
        Refusal: one of the lines was edited.
    """
    lines: dict[str, list[str]] = {anchor.file: anchor.marked for anchor in ANCHORS}
    if record is not None:
        lines |= {path: edit.lines for path, edit in record.edited.items()}
    contents = {path: tree.read(path) for path in reversed(lines)}
    return {
        path: remove(path, content, lines[path])
        for path, content in contents.items()
        if content is not None
    }


def edited_copies(tree: Tree, record: Record) -> list[str]:
    """The plugin's files in the folder that are no longer as it put them there."""
    there = [path for path in record.copied if tree.occupied(path)]
    return [
        path
        for path in there
        if (tree.root / path).is_symlink() or sha256(tree.read(path) or b"") != record.copied[path]
    ]


def refuse_edited(tree: Tree, record: Record, why: str) -> None:
    """Refuse to go on where a copied file was edited since."""
    edited = edited_copies(tree, record)
    if edited:
        more = f", and so were {len(edited) - 1} more" if edited[1:] else ""
        raise Refusal(
            f"{tree.root / edited[0]} was edited since the plugin put it there{more}; {why}. "
            "Nothing was changed. Move your version away or delete it, and call the command again."
        )


def _restore(tree: Tree, stock: Mapping[str, bytes]) -> None:
    for path, content in stock.items():
        if tree.read(path) != content:
            tree.write(path, content)
        tree.forget_unfinished(path)
