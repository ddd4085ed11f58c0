"""Small real pictures on disk, and options and batches to train on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from library.training.data import Batch, TrainingData
from library.training.options import Options


def options_for(folder: Path | str | None = None, **changes: Any) -> Options:
    """Options of a small run on the DreamBooth folders in `folder`."""
    defaults: dict[str, Any] = {"resolution": "64", "seed": 7, "caption_extension": ".txt"}
    if folder is not None:
        defaults["train_data_dir"] = str(folder)
    return Options(**{**defaults, **changes})


def picture(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A picture of smooth random colours; no two seeds give the same."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    image = Image.fromarray(coarse.squeeze(), mode)
    return image.resize(size, Image.Resampling.BICUBIC)


def write_picture(
    path: Path, size: tuple[int, int] = (64, 64), caption: str | None = None, **how: Any
) -> Path:
    """Save a picture and, if there is a caption, a .txt beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(size, **how).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_folder(folder: Path, count: int, size: tuple[int, int] = (64, 64)) -> list[Path]:
    """`count` different pictures with captions."""
    return [
        write_picture(folder / f"{index:02}.png", size, f"icon, number {index}", seed=index)
        for index in range(count)
    ]


@pytest.fixture
def dreambooth_dir(tmp_path: Path) -> Path:
    """A folder with `2_cat` in it: seven pictures, twice each."""
    write_folder(tmp_path / "2_cat", 7)
    return tmp_path


def damage(path: Path) -> None:
    """Overwrite some of a file's middle; its header and its end stay as they are."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = b"\xff\xc4\0\1\xff\xda\0\0"
    path.write_bytes(content)


def batches(
    data: TrainingData,
    options: Options,
    start: tuple[int, int] = (0, 0),
    epochs: int = 1,
    process: int = 0,
    processes: int = 1,
) -> list[tuple[int, int, Batch]]:
    """What a process gets from the loader: (epoch, index, batch)."""
    loader = data.loader(options, start, epochs, process, processes)
    items = list(loader)
    assert len(items) == len(loader)
    return items
