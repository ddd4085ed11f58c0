"""What was found out about pictures, kept in a file so that none is looked at twice.

To look at a picture is to decode it, which takes milliseconds for each; a start with ten thousand
known ones takes a second instead of minutes. An entry counts as long as the length and time of its
picture are as they were. Only sound pictures are noted.

The files are in the user's cache folder, one for each folder of pictures or metadata file. With
`cache_info` a folder's own is used, which is sd-scripts' `metadata_cache.json`:
{path: {"caption": …, "resolution": [width, height]}}, with what is said here beside it. Captions
are written for sd-scripts' sake and read from their own files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.training.dataset_config import SubsetSpec
from library.training.files import write_atomically
from library.training.picture_files import BrokenPicture, PictureInfo, inspect_all, stamp

NAME = "metadata_cache.json"


@dataclass
class SizeCache:
    """One such file; none where the user has no home."""

    path: Path | None
    entries: dict[str, Any]

    @classmethod
    def of(cls, subset: SubsetSpec) -> SizeCache:
        """The cache of a subset's pictures."""
        if subset.cache_info and subset.image_dir is not None and subset.metadata_file is None:
            return cls._read(Path(subset.image_dir, NAME))
        return cls.of_source(subset.source)

    @classmethod
    def of_source(cls, source: str) -> SizeCache:
        """The cache of a folder or metadata file, apart from it."""
        folder = cache_folder()
        if folder is None:
            return cls(None, {})
        place = os.fsencode(os.path.abspath(source))
        return cls._read(folder / f"{hashlib.blake2b(place, digest_size=16).hexdigest()}.json")

    @classmethod
    def _read(cls, path: Path) -> SizeCache:
        """An unreadable file counts as an empty one and is replaced."""
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entries = {}
        return cls(path, entries if isinstance(entries, dict) else {})

    def inspect(self, paths: Iterable[str]) -> dict[str, PictureInfo | BrokenPicture]:
        """What is known of each picture, or else what a look at it shows."""
        known: dict[str, PictureInfo | BrokenPicture] = {}
        unknown = []
        for path in paths:
            info = self._known(path)
            if info is None:
                unknown.append(path)
            else:
                known[path] = info
        return known | inspect_all(unknown)

    def _known(self, path: str) -> PictureInfo | None:
        entry = self.entries.get(path)
        if isinstance(entry, dict):
            with suppress(OSError):  # it is gone
                if entry.get("decoded") == stamp(path):
                    width, height = entry["resolution"]
                    return PictureInfo((width, height), entry["alpha"])
        return None

    def save(
        self, infos: Mapping[str, PictureInfo | BrokenPicture], captions: Mapping[str, str]
    ) -> str | None:
        """Note the sound pictures, if there is anything new; what to tell if it fails."""
        if self.path is None:
            return None
        entries: dict[str, Any] = {
            path: {
                "resolution": list(info.size),
                "alpha": info.has_alpha,
                "decoded": stamp(path),
            }
            for path, info in infos.items()
            if isinstance(info, PictureInfo)
        }
        if self.path.name == NAME:
            for path, entry in entries.items():
                entry["caption"] = captions[path]
        if entries == self.entries:
            return None
        text = json.dumps(entries, indent=2)
        try:
            write_atomically(self.path, lambda file: _write(file, text))
        except OSError as error:
            return (
                f"{self.path}: cannot be written ({error.strerror}): the next start looks at all "
                "pictures again"
            )
        return None


def cache_folder() -> Path | None:
    """Where this program keeps what it can find out anew, as other programs of the user do."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "hina" / "pictures"
    except RuntimeError:  # the user has no home
        return None


def _write(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")
