"""Finding picture files, and telling sound ones from broken ones."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError, features
from tqdm import tqdm

# Decoding keeps a core busy, opening files on network drives is mostly waiting.
_THREADS = max(8, os.cpu_count() or 1)
_ORIENTATION_TAG = 0x0112

# What Pillow's decoders raise; RuntimeError is AVIF's.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError)


def _extensions() -> tuple[str, ...]:
    """Stock's extensions; .avif and .jxl where Pillow or a plugin of it can read them."""
    found = [".png", ".jpg", ".jpeg", ".webp", ".bmp"]
    if features.check("avif"):
        found.append(".avif")
    if importlib.util.find_spec("pillow_jxl") is not None:
        importlib.import_module("pillow_jxl")  # registers itself with Pillow
        found.append(".jxl")
    return tuple(found)


EXTENSIONS = _extensions()


class BrokenPicture(Exception):
    """A file that has a picture's name and cannot be read as one; the message says why."""


@dataclass(frozen=True)
class PictureInfo:
    """What is to be known of a sound picture."""

    size: tuple[int, int]  # (width, height), the right way up
    has_alpha: bool


def find_pictures(folder: str) -> list[str]:
    """The picture files directly in `folder`, in the order of their names."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.path
            for entry in entries
            if entry.name.lower().endswith(EXTENSIONS)
            and not entry.name.startswith(".")  # macOS keeps ._name.jpg beside name.jpg
            and entry.is_file()
        )


def inspect_all(paths: Iterable[str]) -> dict[str, PictureInfo | BrokenPicture]:
    """What `inspect` says of each file: its size, or why it is broken."""

    def attempt(path: str) -> PictureInfo | BrokenPicture:
        try:
            return inspect(path)
        except BrokenPicture as reason:
            return reason

    every = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(_THREADS) as pool:
        infos = tqdm(
            pool.map(attempt, every),
            desc="checking pictures",
            total=len(every),
            unit="picture",
            delay=1,
            leave=False,
            disable=os.environ.get("RANK", "0") != "0",
        )
        return dict(zip(every, infos, strict=True))


def inspect(path: str) -> PictureInfo:
    """The size of a picture; BrokenPicture if the file is not one that can be decoded.

    Takes milliseconds, as nothing short of decoding tells that the middle of a file is damaged:
    1024×1024 pixels of PNG 2, of JPEG 8, of WebP 47.
    """
    try:
        if os.path.getsize(path) == 0:
            raise BrokenPicture("is empty (0 bytes)")
        with Image.open(path) as image:
            if min(image.size) < 1:
                raise BrokenPicture("has no pixels")
            width, height = image.size
            if orientation(image) >= 5:  # lying on its side
                width, height = height, width
            has_alpha = image.has_transparency_data
            if not _checksums_agree(image):
                _decode(path)
            return PictureInfo((width, height), has_alpha)
    except UnidentifiedImageError:
        raise BrokenPicture(f"is not a picture: it is {_describe(path)}") from None
    except Image.DecompressionBombError as error:
        raise BrokenPicture(f"is too large to be opened safely: {error}") from None
    except FileNotFoundError:
        raise BrokenPicture("does not exist") from None
    except PermissionError:
        raise BrokenPicture("may not be read: check its permissions") from None
    except DECODING_ERRORS as error:
        raise BrokenPicture(f"is damaged or incomplete: {error}") from None


def _checksums_agree(image: Image.Image) -> bool:
    """Whether all parts of a picture are as they were written; only PNG has sums that tell."""
    if image.format == "PNG":
        with suppress(*DECODING_ERRORS):
            image.verify()
            return True
    return False


def _decode(path: str) -> None:
    with Image.open(path) as image:
        image.draft(None, (1, 1))  # JPEG: all is read, but not all of each pixel block computed
        image.load()


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened picture, from 1 to 8; 1 is the right way up.

    To be asked before the picture is loaded. A PNG's counts if it stands before the pixels: Pillow
    would decode all of them to look for one behind.
    """
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if value in range(1, 9) else 1


def stamp(path: str) -> str:
    """Changes when the file is written anew: its length and time, which need no reading."""
    status = os.stat(path)
    return f"{status.st_size}:{status.st_mtime_ns}"


def _describe(path: str) -> str:
    """What a file that is no picture seems to be, from its first bytes."""
    with open(path, "rb") as file:
        head = file.read(512)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"avif"):
        return "a HEIC or AVIF picture, which Pillow cannot read here; save it as PNG or JPEG"
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, as a failed download leaves it"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; `git lfs pull` fetches the picture"
    if b"\0" not in head:
        try:
            head[:256].decode("utf-8", errors="strict")
        except UnicodeDecodeError:
            return "of an unknown format"
        return "a text file"
    return "of an unknown format"
