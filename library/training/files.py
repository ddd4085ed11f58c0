"""Files that are there whole or not at all.

Everything the trainer writes is written beside its place and renamed, so that a kill at any moment
leaves the last good version.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Call `write` with a temporary path in the same folder, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: some writers choose their format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_folder_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Call `write` with an empty temporary folder beside `path`, then rename it to `path`.

    A folder of that name is moved aside first and removed only when the new one stands in its
    place. If that fails it is moved back; after a kill between the two, `recover_folder` does it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    temporary, aside = path.with_name(f".{path.name}.tmp"), _aside(path)
    for left_by_a_kill in (temporary, aside):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for file in temporary.iterdir():
            _flush_to_disk(file)
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
    finally:
        recover_folder(path)  # raises if it cannot: then nothing is removed
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
    return path


def recover_folder(path: Path) -> None:
    """Move the folder `path` back to its place if a write was killed when it stood aside.

    To be called before `path` is looked for. Does nothing otherwise.
    """
    aside = _aside(path)
    if aside.is_dir() and not path.exists():
        with suppress(FileNotFoundError):  # another process of the run was quicker
            os.replace(aside, path)


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.old"  # `with_name` refuses a path such as "."


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
