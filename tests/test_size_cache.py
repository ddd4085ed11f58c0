"""A picture is looked at once: what was found out is kept, until its file changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from picture_folders import options_for, write_folder, write_picture

from library.training import picture_files
from library.training.data import TrainingData
from library.training.errors import UserError


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that are looked at, as they are."""
    names: list[str] = []
    inspect = picture_files.inspect

    def watched(path: str) -> Any:
        names.append(os.path.basename(path))
        return inspect(path)

    monkeypatch.setattr(picture_files, "inspect", watched)
    return names


@pytest.mark.parametrize("cache_info", [False, True])
def test_a_picture_is_looked_at_once_until_it_changes(
    dreambooth_dir: Path, opened: list[str], cache_info: bool
) -> None:
    options = options_for(dreambooth_dir, cache_info=cache_info)
    TrainingData.open(options)
    assert len(opened) == 7
    opened.clear()
    TrainingData.open(options)
    assert opened == []
    write_picture(dreambooth_dir / "2_cat" / "01.png", (80, 60))
    data, _ = TrainingData.open(options)
    assert opened == ["01.png"]
    assert data.records[1].size == (80, 60)
    noted = dreambooth_dir / "2_cat" / "metadata_cache.json"
    assert noted.exists() == cache_info


def test_sizes_are_noted_as_sd_scripts_notes_them(dreambooth_dir: Path, opened: list[str]) -> None:
    options = options_for(dreambooth_dir, cache_info=True)
    TrainingData.open(options)
    file = dreambooth_dir / "2_cat" / "metadata_cache.json"
    noted = json.loads(file.read_text())
    assert len(noted) == 7
    entry = noted[str(dreambooth_dir / "2_cat" / "00.png")]
    assert entry["resolution"] == [64, 64]
    assert entry["caption"] == "icon, number 0"
    opened.clear()
    file.write_text("torn")
    assert len(TrainingData.open(options)[0].records) == 7
    # As sd-scripts itself writes it, without a word on whether the picture is sound.
    for each in noted.values():
        del each["decoded"]
    file.write_text(json.dumps(noted))
    TrainingData.open(options)
    assert len(opened) == 14


def test_masks_are_looked_at_once_too(dreambooth_dir: Path, opened: list[str]) -> None:
    write_folder(dreambooth_dir / "masks", 7)
    options = options_for(
        dreambooth_dir,
        masked_loss=True,
        conditioning_data_dir=str(dreambooth_dir / "masks"),
        cache_info=True,
    )
    TrainingData.open(options)
    assert len(opened) == 14
    # sd-scripts takes every entry of this file for a picture to train on.
    assert len(json.loads((dreambooth_dir / "2_cat" / "metadata_cache.json").read_text())) == 7
    TrainingData.open(options)
    assert len(opened) == 14


def test_pictures_that_are_gone_are_missed(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    (tmp_path / "m.json").write_text('{"00.png": {"caption": "a"}, "01.png": {"caption": "b"}}')
    options = options_for(tmp_path, in_json=str(tmp_path / "m.json"))
    TrainingData.open(options)
    (tmp_path / "01.png").unlink()
    with pytest.raises(UserError, match=r"01\.png: does not exist"):
        TrainingData.open(options)


def test_a_cache_that_cannot_be_written_is_noted(
    dreambooth_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data, _ = TrainingData.open(options_for(dreambooth_dir))
    assert len(data.records) == 7
    assert "cannot be written" in data.describe()[-1]
