"""Putting the plugin in: first its files, which nothing uses yet, then the lines that use them."""

from __future__ import annotations

import ast
import difflib
import warnings
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from .anchors import ANCHORS, insert
from .errors import Refusal
from .payload import read_payload, version_of
from .record import PATH, Edit, Record, read_record, sha256, write_record
from .revert import edited_copies, take_out, without_lines
from .status import is_whole
from .tree import Tree


@dataclass(frozen=True)
class Plan:
    """What `apply` is going to write.

    Attributes:
        record: of the folder as it will be.
        copies, edits: new contents by path; `stock` holds what the edited files hold without them.
        previous: what an earlier `apply` left, to be taken out first.
    """

    record: Record
    copies: dict[str, bytes]
    edits: dict[str, bytes]
    stock: dict[str, bytes]
    previous: Record | None


def plan_apply(tree: Tree) -> Plan | None:
    """What there is to do; None if the folder holds this version already, whole.

    Raises:
        Refusal: something is in the way; nothing was changed.
    """
    previous = read_record(tree)
    payload = read_payload()
    version = version_of(payload)
    if previous is not None:
        edited = edited_copies(tree, previous)
        if edited:
            raise Refusal(
                f"{tree.root / edited[0]} was edited since the plugin put it there"
                f"{f', and so were {len(edited) - 1} more' if edited[1:] else ''}. Nothing was "
                "changed. Move your version away or delete it, and call apply again."
            )
        if previous.version == version and is_whole(tree, previous):
            return None
    _refuse_foreign(tree, payload, previous)
    stock = without_lines(tree, previous)
    edits = {anchor.file: insert(anchor, stock[anchor.file]) for anchor in ANCHORS}
    for path, content in edits.items():
        _refuse_unreadable(path, content)
    record = Record(
        version=version,
        state="applied",
        copied={path: sha256(content) for path, content in payload.items()},
        edited={
            anchor.file: Edit(anchor.marked, sha256(stock[anchor.file]), sha256(edits[anchor.file]))
            for anchor in ANCHORS
        },
        folders=_new_folders(tree, payload, previous),
    )
    return Plan(record, payload, edits, stock, previous)


def carry_out(tree: Tree, plan: Plan) -> None:
    """Do what is planned. If that is interrupted, all of it is taken out again.

    Raises:
        Refusal: a file could not be written; the folder is as it was without the plugin.
    """
    tree.check_writable([PATH, *plan.copies, *plan.edits])
    if plan.previous is not None:
        take_out(tree, plan.previous)
    changing = replace(plan.record, state="changing")
    try:
        write_record(tree, changing)
        for folder in plan.record.folders:
            (tree.root / folder).mkdir(exist_ok=True)
        for path, content in {**plan.copies, **plan.edits}.items():
            tree.write(path, content)
        write_record(tree, plan.record)
    except BaseException as error:
        take_out(tree, changing)
        if isinstance(error, OSError):
            raise Refusal(
                f"{error.filename}: {error.strerror}. The folder is as it was without the plugin."
            ) from error
        raise


def describe(plan: Plan, tree: Tree) -> str:
    """What `apply` would do, for `--dry-run`: the edits as a diff, then the files."""
    lines: list[str] = []
    for path, content in plan.edits.items():
        before, after = (
            each.decode(errors="replace").splitlines() for each in (plan.stock[path], content)
        )
        lines += difflib.unified_diff(before, after, path, path, n=1, lineterm="")
    size = sum(map(len, plan.copies.values()))
    lines += ["", f"{len(plan.copies)} files ({size / 1024:.0f} KiB) would be copied:"]
    lines += [f"    {path}" for path in plan.copies]
    return "\n".join(lines)


def _refuse_unreadable(path: str, content: bytes) -> None:
    """Refuse a file that Python could not read with the plugin's lines in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stock's own
        try:
            ast.parse(content)
        except SyntaxError as error:
            raise Refusal(
                f"{path}: with the plugin's lines it would be no valid Python (line "
                f"{error.lineno}: {error.msg}). Nothing was changed. Take back what was edited."
            ) from error


def _refuse_foreign(tree: Tree, payload: dict[str, bytes], previous: Record | None) -> None:
    """Refuse to replace a file that the plugin did not put there."""
    ours = previous.copied if previous else {}
    foreign = [path for path in payload if path not in ours and tree.read(path) is not None]
    if foreign:
        raise Refusal(
            f"{tree.root / foreign[0]} is there already, and not from the plugin"
            f"{f'; so are {len(foreign) - 1} more' if foreign[1:] else ''}. Nothing was changed. "
            "Move it away or delete it, and call apply again."
        )


def _new_folders(tree: Tree, payload: dict[str, bytes], previous: Record | None) -> list[str]:
    """The folders to be made, outer ones first."""
    ours = previous.folders if previous else []
    folders = {parent.as_posix() for path in payload for parent in PurePosixPath(path).parents}
    return sorted(
        folder for folder in folders if folder in ours or not (tree.root / folder).is_dir()
    )
