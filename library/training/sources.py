"""The pictures that a subset names, each with its raw caption, before any is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.training.captions import caption_path, read_caption
from library.training.config_text import parse_json, read_json, read_text
from library.training.dataset_config import SubsetSpec
from library.training.errors import UserError
from library.training.picture_files import EXTENSIONS, find_pictures

_SHOWN = 5  # names shown of a long list that is no error


@dataclass
class Findings:
    """What was noticed while the pictures of all datasets were gathered."""

    problems: list[str] = field(default_factory=list)  # training cannot start
    broken: list[str] = field(default_factory=list)  # pictures that can be left out
    empty: list[str] = field(default_factory=list)  # folders without pictures
    notes: list[str] = field(default_factory=list)  # worth knowing


@dataclass(frozen=True)
class Listed:
    """A picture as its subset names it."""

    name: str  # within the subset: does not change when the folder is moved
    path: str
    caption: str


def list_pictures(subset: SubsetSpec, findings: Findings) -> list[Listed]:
    """The pictures of `subset` with their raw captions, in a fixed order."""
    if subset.metadata_file is not None:
        return _list_metadata(subset, subset.metadata_file, findings)
    assert subset.image_dir is not None  # the config sees to it
    return _list_folder(subset, subset.image_dir, findings)


def _list_folder(subset: SubsetSpec, folder: str, findings: Findings) -> list[Listed]:
    paths = find_pictures(folder)
    if not paths:
        findings.empty.append(_no_pictures(folder))
    listed, without = [], []
    for path in paths:
        caption = subset.class_tokens or ""
        try:
            file = caption_path(path, subset.caption_extension)
            if file is None:
                without.append(os.path.basename(path))
            else:
                caption = read_caption(file)
        except UserError as problem:
            findings.problems.append(str(problem))
        listed.append(Listed(os.path.basename(path), path, caption))
    if without:
        findings.notes.append(_without_captions(subset, folder, without, len(paths)))
    return listed


def _without_captions(subset: SubsetSpec, folder: str, names: list[str], count: int) -> str:
    which = "none of the" if len(names) == count else f"{len(names)} of the"
    used = f"{subset.class_tokens!r} (class_tokens)" if subset.class_tokens else "empty"
    text = (
        f"{folder}: {which} {count} pictures has a {subset.caption_extension} file: "
        f"{'their' if len(names) > 1 else 'its'} caption is {used}"
    )
    if len(names) < count:
        text += f" ({_some(names)})"
    stems = {os.path.splitext(name)[0] for name in names}
    endings = {
        file.suffix
        for file in Path(folder).iterdir()
        if file.stem in stems and file.suffix in (".txt", ".caption", ".cap", ".tags")
    } - {subset.caption_extension}
    if endings:
        text += f". There are {'/'.join(sorted(endings))} files: set caption_extension to use them"
    return text


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _no_pictures(folder: str) -> str:
    """Why a folder seems to have no pictures."""
    text = f"{folder}: no pictures in it (known endings: {', '.join(EXTENSIONS)})"
    inside = [path for path in Path(folder).iterdir() if path.is_dir() and find_pictures(str(path))]
    if inside:
        text += f". Pictures of folders in it are not read; {inside[0].name} has some: name that"
    others = sorted({path.suffix for path in Path(folder).iterdir() if path.is_file()} - {""})
    if others and not inside:
        text += f". It has {', '.join(others[:_SHOWN])} files"
    return text


def _list_metadata(subset: SubsetSpec, file: str, findings: Findings) -> list[Listed]:
    """The pictures of a metadata file: {name: {"caption": …, "tags": …}}, or JSON lines."""
    listed = []
    try:
        for name, entry in _entries(Path(file)):
            path = _picture_path(name, subset)
            if path is None:
                findings.problems.append(
                    f"{file}: {name!r} is a relative path: name its folder as image_dir "
                    "(--train_data_dir)"
                )
                continue
            listed.append(Listed(name, path, _metadata_caption(entry, subset)))
    except UserError as problem:
        findings.problems.append(str(problem))
        return []
    if not listed and not findings.problems:
        findings.problems.append(f"{file}: no pictures are listed in it")
    return listed


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(picture, entry) for each picture of a metadata file."""
    if file.suffix.lower() != ".jsonl":
        content = read_json(file)
        if not isinstance(content, dict):
            raise UserError(f"{file}: must hold one table: picture → caption")
        for name, entry in content.items():
            yield name, _checked(entry, f"{file}: {name!r}")
        return
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if line.strip():
            entry = _checked(parse_json(line, str(file), number), f"{file}:{number}")
            if not isinstance(entry.get("image_path"), str):
                raise UserError(f"{file}:{number}: there is no image_path")
            yield entry["image_path"], entry


def _checked(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f'{where}: expected {{"caption": …}}, not {entry!r}')
    for key in ("caption", "tags"):
        if not isinstance(entry.get(key, ""), (str, type(None))):
            raise UserError(f"{where}: {key} must be text, not {entry[key]!r}")
    return entry


def _picture_path(name: str, subset: SubsetSpec) -> str | None:
    """Where the picture lies; older metadata files leave the extension out of its name."""
    if not os.path.isabs(name) and subset.image_dir is None:
        return None
    path = os.path.join(subset.image_dir or "", name)
    if not path.lower().endswith(EXTENSIONS) and not os.path.exists(path):
        found = [path + extension for extension in EXTENSIONS if os.path.exists(path + extension)]
        return found[0] if found else path
    return path


def _metadata_caption(entry: dict[str, Any], subset: SubsetSpec) -> str:
    """Caption, then tags; with wildcards on, the tags follow each line of the caption."""
    caption, tags = entry.get("caption") or "", entry.get("tags") or ""
    separator = subset.caption_separator
    if subset.enable_wildcard and tags:
        tags = tags.replace("\n", separator)
        lines = [line for line in caption.split("\n") if line.strip()]
        return "\n".join(f"{line}{separator}{tags}" for line in lines) or tags
    return separator.join(part for part in (caption, tags) if part)
