"""The pictures of a run with captions and masks: which ones, and every mistake among them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from picture_folders import batches, damage, options_for, write_folder, write_picture

from library.training.data import TrainingData
from library.training.errors import UserError


def test_regularization_pictures_match_the_others_in_number(tmp_path: Path) -> None:
    write_folder(tmp_path / "train" / "3_cat", 4)  # 12 samples
    write_folder(tmp_path / "reg" / "1_animal", 5)
    options = options_for(
        tmp_path / "train",
        reg_data_dir=str(tmp_path / "reg"),
        prior_loss_weight=0.25,
        max_data_loader_n_workers=0,
    )
    data, _ = TrainingData.open(options)
    repeats = [record.repeats for record in data.records if record.subset.is_reg]
    assert repeats == [3, 3, 2, 2, 2]
    weights = [batch.loss_weights.item() for _, _, batch in batches(data, options)]
    assert sorted(weights) == [0.25] * 12 + [1.0] * 12


def test_more_regularization_pictures_than_needed_are_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "train" / "3_cat", 1)
    write_folder(tmp_path / "reg" / "2_animal", 5)
    data, _ = TrainingData.open(options_for(tmp_path / "train", reg_data_dir=str(tmp_path / "reg")))
    assert [record.repeats for record in data.records] == [3, 2, 2]
    assert "6 of 10 regularization samples are not used" in data.describe()[-1]


def test_a_whole_subset_for_validation(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", 3)
    write_folder(tmp_path / "b", 2)
    (tmp_path / "data.toml").write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'b'}'\nvalidation_split = 1.0\n"
    )
    data, validation = TrainingData.open(
        options_for(dataset_config=str(tmp_path / "data.toml"), validation_split=0.0)
    )
    assert validation is not None
    assert (len(data.records), len(validation.records)) == (3, 2)


def test_all_broken_pictures_are_listed_and_can_be_skipped(dreambooth_dir: Path) -> None:
    (dreambooth_dir / "2_cat" / "a.png").write_text("no picture")
    (dreambooth_dir / "2_cat" / "b.jpg").touch()
    whole = (dreambooth_dir / "2_cat" / "00.png").read_bytes()
    (dreambooth_dir / "2_cat" / "c.png").write_bytes(whole[:-30])
    with pytest.raises(UserError) as caught:
        TrainingData.open(options_for(dreambooth_dir))
    message = str(caught.value)
    assert message.startswith("3 problems:")
    for name, reason in (("a.png", "a text file"), ("b.jpg", "empty"), ("c.png", "incomplete")):
        assert any(name in line and reason in line for line in message.splitlines())
    assert "--skip_broken_images" in message
    data, _ = TrainingData.open(options_for(dreambooth_dir, skip_broken_images=True))
    assert len(data.records) == 7
    assert any("3 broken pictures are left out" in line for line in data.describe())


def test_pictures_damaged_in_the_middle_are_listed_too(dreambooth_dir: Path) -> None:
    for name in ("01.png", "04.png"):
        damage(dreambooth_dir / "2_cat" / name)
    with pytest.raises(UserError) as caught:
        TrainingData.open(options_for(dreambooth_dir))
    message = str(caught.value)
    assert message.startswith("2 problems:")
    for name in ("01.png", "04.png"):
        assert f"{name}: is damaged or incomplete" in message
    options = options_for(dreambooth_dir, skip_broken_images=True, max_data_loader_n_workers=0)
    data, _ = TrainingData.open(options)
    assert any("2 broken pictures are left out" in line for line in data.describe())
    assert sum(len(batch.paths) for _, _, batch in batches(data, options)) == 10


def test_bad_captions_and_folders_are_listed_together(dreambooth_dir: Path) -> None:
    (dreambooth_dir / "2_cat" / "03.txt").write_bytes(b"caf\xe9")
    (dreambooth_dir / "2_cat" / "04.txt").write_bytes(b"")
    (dreambooth_dir / "2_cat" / "05.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        TrainingData.open(options_for(dreambooth_dir))
    message = str(caught.value)
    assert "05.png: is empty" in message
    assert "03.txt: the caption is not UTF-8" in message
    assert "04.txt: the caption file is empty" in message


def test_a_folder_without_pictures_is_noted_if_others_have_some(dreambooth_dir: Path) -> None:
    write_picture(dreambooth_dir / "1_empty" / "inner" / "a.png")
    (dreambooth_dir / "3_text").mkdir()
    (dreambooth_dir / "3_text" / "a.txt").touch()
    data, _ = TrainingData.open(options_for(dreambooth_dir))
    assert len(data.records) == 7
    notes = [line for line in data.describe() if line.startswith("note: ")]
    assert any("1_empty: no pictures in it" in note and "inner has some" in note for note in notes)
    assert any("3_text: no pictures in it" in note and ".txt files" in note for note in notes)
    shutil.rmtree(dreambooth_dir / "2_cat")
    with pytest.raises(UserError) as caught:
        TrainingData.open(options_for(dreambooth_dir))
    message = str(caught.value)
    assert message.startswith("2 problems:")
    assert "1_empty: no pictures in it" in message
    assert "3_text: no pictures in it" in message


def test_missing_captions_are_told_with_the_way_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "1_sks cat", 2)
    options = options_for(tmp_path, caption_extension=".caption")
    data, _ = TrainingData.open(options)
    assert {record.caption for record in data.records} == {"sks cat"}
    note = data.describe()[-1]
    assert "none of the 2 pictures has a .caption file" in note
    assert "There are .txt files: set caption_extension" in note


def test_mask_pictures_are_matched_by_name_and_checked(dreambooth_dir: Path) -> None:
    write_folder(dreambooth_dir / "masks", 6)
    options = options_for(
        dreambooth_dir, masked_loss=True, conditioning_data_dir=str(dreambooth_dir / "masks")
    )
    with pytest.raises(UserError, match=r"no mask of the same name for 06\.png"):
        TrainingData.open(options)
    write_picture(dreambooth_dir / "masks" / "06.jpg", (100, 64))
    with pytest.raises(UserError, match=r"06\.jpg: the mask is 100×64, of another shape"):
        TrainingData.open(options)
    write_picture(dreambooth_dir / "masks" / "06.jpg", (128, 128))
    data, _ = TrainingData.open(options)
    assert [Path(record.mask_path or "").name for record in data.records][-2:] == [
        "05.png",
        "06.jpg",
    ]


def test_metadata_captions(tmp_path: Path) -> None:
    write_folder(tmp_path, 3)
    table = {
        "00.png": {"caption": "a cat", "tags": "red, small", "train_resolution": [64, 64]},
        "01": {"tags": "blue"},
        str(tmp_path / "02.png"): {"caption": "two\nlines"},
    }
    (tmp_path / "m.json").write_text(json.dumps(table))
    options = options_for(tmp_path, in_json=str(tmp_path / "m.json"))
    data, _ = TrainingData.open(options)
    assert [record.caption for record in data.records] == ["a cat,red, small", "blue", "two\nlines"]
    lines = "".join(
        json.dumps({"image_path": name, "caption": f"cat {name}"}) + "\n" for name in ("00.png",)
    )
    (tmp_path / "m.jsonl").write_text(lines)
    data, _ = TrainingData.open(options_for(tmp_path, in_json=str(tmp_path / "m.jsonl")))
    assert [record.caption for record in data.records] == ["cat 00.png"]


def test_metadata_mistakes(tmp_path: Path) -> None:
    write_folder(tmp_path, 1)

    def message(content: str, name: str = "m.json", **changes: Any) -> str:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as caught:
            TrainingData.open(options_for(tmp_path, in_json=str(tmp_path / name), **changes))
        return str(caught.value)

    assert "m.json:1:2: " in message("{oops")
    assert "m.jsonl:2:1: " in message('{"image_path": "00.png"}\noops', "m.jsonl")
    assert "nowhere.png: does not exist" in message('{"nowhere.png": {}}')
    assert "no pictures are listed" in message("{}")
    assert "caption must be text" in message('{"00.png": {"caption": 3}}')
    assert "is a relative path" in message('{"00.png": {}}', train_data_dir=None)


def test_description_and_debugging(dreambooth_dir: Path) -> None:
    options = options_for(dreambooth_dir, shuffle_caption=True, train_batch_size=4)
    data, _ = TrainingData.open(options)
    lines = data.describe()
    assert lines[0] == "dataset 0: 64×64, batch size 4"
    assert lines[1] == f"  {dreambooth_dir / '2_cat'}: 7 pictures × 2, shuffle_caption"
    assert lines[2] == "7 pictures, 14 samples an epoch"
    shown = list(data.debug_lines(options))
    assert len(shown) == 14
    assert "loss weight 1, (height, width) (64, 64) cut at (0, 0) to (64, 64)" in shown[0]


def test_figures_for_the_metadata(dreambooth_dir: Path) -> None:
    (pictures,) = TrainingData.open(options_for(dreambooth_dir))[0].sets
    assert pictures.num_train_images == 14
    assert pictures.regularization_found == 0
    assert pictures.tag_frequency()["2_cat"]["icon"] == 7
    assert pictures.mean_aspect_error() == 0
