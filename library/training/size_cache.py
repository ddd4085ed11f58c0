"""`cache_info`: the sizes of a folder's pictures, kept in a file so that none has to be opened.

The file is stock's `metadata_cache.json`: {path: {"caption": …, "resolution": [width, height]}}.
Each entry also notes the picture file's length and time; an entry that lacks them, or whose picture
has changed since, is not used. Captions are written for stock's sake and read from their own files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.training.dataset_config import SubsetSpec
from library.training.files import write_atomically
from library.training.picture_files import BrokenPicture, PictureInfo, stamp

NAME = "metadata_cache.json"


@dataclass
class SizeCache:
    """The cache file of one folder; of nothing where `cache_info` is off."""

    path: Path | None
    entries: dict[str, Any]

    @classmethod
    def of(cls, subset: SubsetSpec) -> SizeCache:
        """The cache of a subset; an unreadable file counts as an empty one and is replaced."""
        if not subset.cache_info or subset.image_dir is None or subset.metadata_file is not None:
            return cls(None, {})
        path = Path(subset.image_dir, NAME)
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entries = {}
        return cls(path, entries if isinstance(entries, dict) else {})

    def known(self, paths: list[str]) -> dict[str, PictureInfo | BrokenPicture]:
        """What is noted of those of `paths` that have not changed since."""
        found: dict[str, PictureInfo | BrokenPicture] = {}
        for path in paths:
            entry = self.entries.get(path)
            if isinstance(entry, dict) and entry.get("stamp") == stamp(path):
                width, height = entry["resolution"]
                found[path] = PictureInfo((width, height), entry["alpha"])
        return found

    def save(
        self, captions: Mapping[str, str], infos: Mapping[str, PictureInfo | BrokenPicture]
    ) -> str | None:
        """Note the sound pictures' sizes if they are not noted yet; what to tell if it fails."""
        if self.path is None:
            return None
        entries = {
            path: {
                "caption": caption,
                "resolution": list(info.size),
                "alpha": info.has_alpha,
                "stamp": stamp(path),
            }
            for path, caption in captions.items()
            if isinstance(info := infos[path], PictureInfo)
        }
        if entries == self.entries:
            return None
        text = json.dumps(entries, ensure_ascii=False, indent=2)
        try:
            write_atomically(self.path, lambda file: _write(file, text))
        except OSError as error:
            return f"{self.path}: cannot be written ({error.strerror}), so cache_info has no effect"
        return None


def _write(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")
