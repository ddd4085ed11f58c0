"""What of the plugin is in a folder, and whether it was edited since."""

from __future__ import annotations

from .anchors import ANCHORS, in_place
from .payload import read_payload, version_of
from .record import Record, read_record, sha256
from .revert import edited_copies, without_lines
from .tree import RECORD, Tree


def is_whole(tree: Tree, record: Record) -> bool:
    """Whether all that the record tells of is there: the files as they were copied, and the lines
    in their places; what else stands in the edited files is the user's."""
    return record.state == "applied" and not (
        edited_copies(tree, record) or _absent(tree, record) or _displaced(tree, record)
    )


def describe(tree: Tree) -> str:
    """The state of a folder in a few lines.

    Raises:
        Refusal: the folder's record cannot be read, or a line of the plugin was edited.
    """
    ours = version_of(read_payload())
    record = read_record(tree)
    interrupted = f"{tree.root}: an apply or revert{{}} was interrupted. Call apply or revert."
    if record is None:
        stock = without_lines(tree, None)
        marked = [path for path, content in stock.items() if tree.read(path) != content]
        if marked:
            return (
                f"{tree.root}: lines of the plugin are left in {' and '.join(sorted(marked))}, but "
                "its record is gone, and so may be its files. Call apply or revert."
            )
        if tree.has_unfinished(RECORD):
            return interrupted.format(", before its first change,")
        return f"{tree.root}: stock; the plugin is not applied. Apply would put in {ours}."
    if record.state == "changing":
        return interrupted.format(f" of hina plugin {record.version}")
    lines = [
        f"{tree.root}: hina plugin {record.version} is applied"
        + ("" if record.version == ours else f"; apply would update it to {ours}"),
        *(f"  {path}: {len(edit.lines)} marked line(s)" for path, edit in record.edited.items()),
        f"  {len(record.copied)} files copied into library/",
        *(_changes(tree, record) or ["  nothing was edited since"]),
    ]
    return "\n".join(lines)


def _changes(tree: Tree, record: Record) -> list[str]:
    """What is not as `apply` left it."""
    displaced = _displaced(tree, record)
    edited = [
        path
        for path, edit in record.edited.items()
        if path not in displaced and sha256(tree.read(path) or b"") != edit.after
    ]
    return [
        *(f"  {path}: edited since; marked lines in place" for path in edited),
        *(f"  {path}: marked lines missing, moved or edited; call apply" for path in displaced),
        *(f"  {path}: edited since" for path in edited_copies(tree, record)),
        *(f"  {path}: missing; apply puts it back" for path in _absent(tree, record)),
    ]


def _absent(tree: Tree, record: Record) -> list[str]:
    return [path for path in record.copied if not tree.occupied(path)]


def _displaced(tree: Tree, record: Record) -> list[str]:
    """The edited files in which the plugin's lines are not where they belong."""
    anchors = {anchor.file: anchor for anchor in ANCHORS}
    return [
        path
        for path, edit in record.edited.items()
        if path in anchors and not in_place(anchors[path], tree.read(path) or b"", edit.lines)
    ]
