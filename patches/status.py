"""What of the plugin is in a folder, and whether it was edited since."""

from __future__ import annotations

from .anchors import ANCHORS, has_marks
from .payload import read_payload, version_of
from .record import Record, read_record, sha256
from .revert import edited_copies
from .tree import Tree


def is_whole(tree: Tree, record: Record) -> bool:
    """Whether all that the record tells of is there: the files as they were copied, and all marked
    lines; what else stands in the edited files is the user's."""
    if record.state != "applied" or edited_copies(tree, record):
        return False
    copied = all(tree.read(path) is not None for path in record.copied)
    return copied and not _missing_lines(tree, record)


def describe(tree: Tree) -> str:
    """The state of a folder in a few lines.

    Raises:
        Refusal: the folder's record cannot be read.
    """
    ours = version_of(read_payload())
    record = read_record(tree)
    if record is None:
        marked = [a.file for a in ANCHORS if has_marks(tree.read(a.file) or b"")]
        if marked:
            return (
                f"{tree.root}: lines of the plugin are left in {' and '.join(marked)}, but its "
                "files are gone. Call apply or revert."
            )
        return f"{tree.root}: stock; the plugin is not applied. Apply would put in {ours}."
    if record.state == "changing":
        return (
            f"{tree.root}: an apply or revert of hina plugin {record.version} was interrupted. "
            "Call apply to finish it, or revert to take it out."
        )
    lines = [
        f"{tree.root}: hina plugin {record.version} is applied"
        + ("" if record.version == ours else f"; apply would update it to {ours}"),
        *(f"  {path}: {len(edit.lines)} marked line(s)" for path, edit in record.edited.items()),
        f"  {len(record.copied)} files copied into library/",
        *_changes(tree, record),
    ]
    return "\n".join(lines)


def _changes(tree: Tree, record: Record) -> list[str]:
    """What is not as `apply` left it."""
    missing = _missing_lines(tree, record)
    contents = {path: tree.read(path) for path in record.edited}
    edited = [
        path
        for path, content in contents.items()
        if content is not None and sha256(content) != record.edited[path].after
    ]
    absent = [path for path in record.copied if tree.read(path) is None]
    lines = [
        *(
            f"  {path}: edited since; marked lines in place"
            for path in edited
            if path not in missing
        ),
        *(f"  {path}: marked lines are missing; apply puts them back" for path in missing),
        *(f"  {path}: edited since" for path in edited_copies(tree, record)),
        *(f"  {path}: missing; apply puts it back" for path in absent),
    ]
    return lines or ["  nothing was edited since"]


def _missing_lines(tree: Tree, record: Record) -> list[str]:
    """The edited files in which not all marked lines stand."""
    present = {
        path: {line.strip() for line in (tree.read(path) or b"").splitlines()}
        for path in record.edited
    }
    return [
        path
        for path, edit in record.edited.items()
        if not {line.encode() for line in edit.lines} <= present[path]
    ]
