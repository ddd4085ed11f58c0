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
from .record import Edit, Record, read_record, sha256, write_record
from .revert import refuse_edited, take_out, without_lines
from .status import is_whole
from .tree import RECORD, Tree


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
    before = previous.copied if previous else {}
    tree.check_places([RECORD, *payload, *before, *(anchor.file for anchor in ANCHORS)])
    if previous is not None:
        refuse_edited(tree, previous, "apply would replace it")
        if previous.version == version and is_whole(tree, previous):
            return None
    _refuse_foreign(tree, payload, previous)
    stock = without_lines(tree, previous)
    edits = {}
    for anchor in ANCHORS:
        if anchor.file not in stock:
            raise Refusal(f"{tree.root / anchor.file} is missing. Get sd-scripts' own file back.")
        edits[anchor.file] = insert(anchor, stock[anchor.file], anchor.marked)
        _refuse_unreadable(anchor.file, stock[anchor.file], edits[anchor.file])
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
    if plan.previous is not None:
        take_out(tree, plan.previous)
    changing = replace(plan.record, state="changing")
    try:
        write_record(tree, changing)
        for folder in plan.record.folders:
            tree.make_folder(folder)
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


def describe(plan: Plan) -> str:
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


def _refuse_unreadable(path: str, stock: bytes, edited: bytes) -> None:
    """Refuse a file that Python could not read with the plugin's lines in it."""
    for content, when in ((stock, "even without"), (edited, "with")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stock's own
            try:
                ast.parse(content)
            except (SyntaxError, ValueError) as error:
                raise Refusal(
                    f"{path} is no valid Python {when} the plugin's lines ({error}). Nothing was "
                    "changed. Take back what was edited there."
                ) from error


def _refuse_foreign(tree: Tree, payload: dict[str, bytes], previous: Record | None) -> None:
    """Refuse to replace, or to hide from Python, what the plugin did not put there."""
    ours = previous.copied if previous else {}
    modules = {f"{folder}.py" for folder in _folders(payload) if "/" in folder}
    foreign = [
        path for path in sorted({*payload, *modules}) if path not in ours and tree.occupied(path)
    ]
    if foreign:
        more = f"; so are {len(foreign) - 1} more" if foreign[1:] else ""
        raise Refusal(
            f"{tree.root / foreign[0]} is there already, and not from the plugin{more}. Nothing "
            "was changed. Move it away or delete it, and call apply again."
        )


def _new_folders(tree: Tree, payload: dict[str, bytes], previous: Record | None) -> list[str]:
    """The folders to be made, outer ones first."""
    ours = previous.folders if previous else []
    return [
        folder
        for folder in sorted(_folders(payload))
        if folder in ours or not (tree.root / folder).is_dir()
    ]


def _folders(payload: dict[str, bytes]) -> set[str]:
    """All folders that hold any of it, from `library` on."""
    parents = {parent for path in payload for parent in PurePosixPath(path).parents}
    return {parent.as_posix() for parent in parents if parent.parts}
