"""Dataset configs: what they mean, and what is said of mistakes in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from picture_folders import options_for, write_folder, write_picture

from library.training.dataset_config import DatasetSpec, read_datasets
from library.training.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "cats", 2)
    return tmp_path


def config(folder: Path, text: str, name: str = "data.toml", **options: Any) -> list[DatasetSpec]:
    """Read a config whose {cats} and {folder} stand for folders of the test."""
    file = folder / name
    text = text.replace("{cats}", (folder / "cats").as_posix())
    file.write_text(text.replace("{folder}", folder.as_posix()), encoding="utf-8")
    return read_datasets(options_for(dataset_config=str(file), **options))


def mistakes(folder: Path, text: str, name: str = "data.toml", **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        config(folder, text, name, **options)
    return str(caught.value)


def test_a_value_comes_from_the_nearest_level(folder: Path) -> None:
    (spec,) = config(
        folder,
        """
        [general]
        keep_tokens = 1
        flip_aug = false
        enable_bucket = true
        min_bucket_reso = 32
        [[datasets]]
        resolution = [64, 96]
        keep_tokens = 2
        [[datasets.subsets]]
        image_dir = '{cats}'
        keep_tokens = 3
        class_tokens = "cat"
        [[datasets.subsets]]
        image_dir = '{folder}'
        is_reg = true
        """,
        keep_tokens=9,
        flip_aug=True,
        train_batch_size=5,
        caption_dropout_rate=0.1,
        prior_loss_weight=0.5,
        min_bucket_reso=16,
        bucket_reso_steps=16,
    )
    assert spec.resolution == (64, 96)
    assert (spec.batch_size, spec.prior_loss_weight) == (5, 0.5)
    assert (spec.enable_bucket, spec.min_bucket_reso, spec.bucket_reso_steps) == (True, 32, 16)
    first, second = spec.subsets
    assert (first.keep_tokens, second.keep_tokens) == (3, 2)
    assert first.flip_aug is False  # false in the file is a choice, too
    assert first.caption_dropout_rate == 0.1
    assert (first.class_tokens, second.class_tokens) == ("cat", None)
    assert (first.is_reg, second.is_reg) == (False, True)


def test_json_means_the_same_as_toml(folder: Path) -> None:
    toml = """
        [general]
        shuffle_caption = true
        [[datasets]]
        [[datasets.subsets]]
        image_dir = '{cats}'
        num_repeats = 4
        face_crop_aug_range = [1, 2.5]
        """
    table = {
        "general": {"shuffle_caption": True},
        "datasets": [
            {
                "subsets": [
                    {"image_dir": "{cats}", "num_repeats": 4, "face_crop_aug_range": [1, 2.5]}
                ]
            }
        ],
    }
    from_json = config(folder, json.dumps(table), "data.json")
    assert from_json == config(folder, toml)
    assert from_json[0].subsets[0].face_crop_aug_range == (1.0, 2.5)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("512", (512, 512)), ("[512, 768]", (512, 768)), ("'640'", (640, 640)), ("'1,2'", (1, 2))],
)
def test_forms_of_a_resolution(folder: Path, written: str, expected: tuple[int, int]) -> None:
    text = f"[[datasets]]\nresolution = {written}\n[[datasets.subsets]]\nimage_dir = '{{cats}}'"
    assert config(folder, text)[0].resolution == expected


def test_the_command_lines_old_spelling_and_missing_dot(folder: Path) -> None:
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{cats}'"
    (spec,) = config(folder, text, caption_extention="tags")
    assert spec.subsets[0].caption_extension == ".tags"


def test_all_mistakes_are_listed_at_once_with_their_places(folder: Path) -> None:
    (folder / "doge").mkdir()
    message = mistakes(
        folder,
        """
        [general]
        is_reg = true
        learning_rate = 1e-4
        [[datasets]]
        train_batch_size = 3
        resolution = 'big'
        [[datasets.subsets]]
        image_dir = '{cats}'
        num_repeat = 10
        batch_size = 2
        [[datasets.subsets]]
        image_dir = '{folder}/dogs'
        num_repeats = '10'
        caption_dropout_rate = 1.5
        shuffle_caption = 1
        [[datasets.subsets]]
        class_tokens = 'cat'
        """,
    )
    for line in (
        "general.is_reg is not an option here: it belongs in [[datasets.subsets]]",
        "general.learning_rate is not an option here: it is an option of the command line",
        "datasets[0].train_batch_size is not an option here: in this file it is called batch_size",
        "datasets[0].resolution: expected a size such as 512",
        "datasets[0].subsets[0].num_repeat is not an option here. Did you mean num_repeats?",
        "datasets[0].subsets[0].batch_size is not an option here: it belongs in [[datasets]]",
        "datasets[0].subsets[1].image_dir ",
        "datasets[0].subsets[1].num_repeats: expected a whole number from 0 on, not '10'",
        "datasets[0].subsets[1].caption_dropout_rate: expected a number from 0 to 1, not 1.5",
        "datasets[0].subsets[1].shuffle_caption: expected true or false, not 1",
        "datasets[0].subsets[2]: image_dir is missing",
    ):
        assert line in message
    assert f"no such folder. Did you mean {folder / 'doge'}?" in message
    assert message.startswith("11 problems:")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[general]\nkeep_tokens 1", ":2:13:"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a", ":3:15:"),
        ("[general\n", ":1:9:"),
    ],
)
def test_a_syntax_error_is_told_with_line_and_column(folder: Path, text: str, place: str) -> None:
    assert f"data.toml{place} " in mistakes(folder, text)


def test_a_windows_path_in_double_quotes_is_explained(folder: Path) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\pictures"'
    message = mistakes(folder, text)
    assert "data.toml:3:" in message
    assert "single quotes" in message


def test_json_syntax_errors_too(folder: Path) -> None:
    assert "data.json:2:14: " in mistakes(folder, '{\n "datasets": ,}', "data.json")


def test_files_that_are_no_config(folder: Path, tmp_path: Path) -> None:
    assert "must end in .toml or .json" in mistakes(folder, "", "data.yaml")
    with pytest.raises(UserError, match=r"nowhere\.toml: there is no such file"):
        read_datasets(options_for(dataset_config="nowhere.toml"))
    (tmp_path / "latin.toml").write_bytes("# é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_datasets(options_for(dataset_config=str(tmp_path / "latin.toml")))


def test_custom_attributes_are_carried_but_for_the_one_that_asks_for_something(
    folder: Path,
) -> None:
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{cats}'\ncustom_attributes = "
    (spec,) = config(folder, text + "{of = 'me', diff_output_preservation = false}")
    assert spec.subsets[0].custom_attributes["of"] == "me"
    message = mistakes(folder, text + "{diff_output_preservation = true}")
    assert "datasets[0].subsets[0].custom_attributes" in message
    assert "diff_output_preservation, which is not built yet" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no [[datasets]]"),
        ("[[datasets]]", "datasets[0] has no [[datasets.subsets]]"),
        ("[datasets]\nresolution = 3", "write [[datasets]] in double brackets"),
        ("[[dataset]]", "dataset does not belong at the top level"),
        ("[[datasets]]\n[datasets.subsets]\nimage_dir='.'", "write [[datasets.subsets]] in double"),
        (
            "[[datasets]]\nnetwork_multiplier = 0.5\n[[datasets.subsets]]\nimage_dir='{cats}'",
            "network_multiplier: expected 1",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir='{cats}'\nnum_repeats=0",
            "nothing to train on",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir='{cats}'\n"
            "[[datasets.subsets]]\nmetadata_file='m.json'",
            "cannot share a dataset",
        ),
    ],
)
def test_wrong_structure(folder: Path, text: str, message: str) -> None:
    assert message in mistakes(folder, text)


def test_metadata_subsets_have_no_caption_files(folder: Path) -> None:
    (folder / "m.json").write_text("{}")
    message = mistakes(
        folder,
        "[[datasets]]\n[[datasets.subsets]]\nmetadata_file='{folder}/m.json'\nis_reg=true\n"
        "class_tokens='cat'",
    )
    assert "subsets[0].is_reg is not an option here: it does not go with metadata_file" in message
    assert "subsets[0].class_tokens is not an option here" in message


def test_a_resolution_is_needed(folder: Path) -> None:
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{cats}'"
    assert "no resolution is set" in mistakes(folder, text, resolution=None)


def test_bucket_limits(folder: Path) -> None:
    text = "[[datasets]]\nenable_bucket = true\n[[datasets.subsets]]\nimage_dir = '{cats}'"
    assert "min_bucket_reso 256 is above the resolution 64×64" in mistakes(folder, text)
    limits: dict[str, Any] = {"min_bucket_reso": 60, "max_bucket_reso": 130}
    (spec,) = config(folder, text, bucket_reso_steps=16, **limits)
    assert (spec.min_bucket_reso, spec.max_bucket_reso) == (48, 144)
    assert len(spec.notes) == 2
    assert "max_bucket_reso 48 is below the resolution" in mistakes(
        folder, text, min_bucket_reso=16, max_bucket_reso=48, bucket_reso_steps=16
    )


def test_the_same_folder_twice_counts_once(folder: Path) -> None:
    text = "[[datasets]]\n" + "[[datasets.subsets]]\nimage_dir = '{cats}'\n" * 2
    (spec,) = config(folder, text)
    assert len(spec.subsets) == 1
    assert "is left out" in spec.notes[0]


def test_masks_need_masked_loss_and_one_source(folder: Path) -> None:
    text = (
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{cats}'\n"
        "conditioning_data_dir = '{cats}'\n"
    )
    assert "needs --masked_loss" in mistakes(folder, text)
    assert "exclude each other" in mistakes(folder, text + "alpha_mask = true", masked_loss=True)
    # alpha_mask on the command line gives way to a subset's own masks.
    (spec,) = config(folder, text, masked_loss=True, alpha_mask=True)
    assert spec.subsets[0].alpha_mask is False
    plain = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{cats}'\n"
    assert "--masked_loss changes nothing" in config(folder, plain, masked_loss=True)[0].notes[0]


def test_numbered_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "train" / "10_sks cat_toy", 2)
    write_folder(tmp_path / "train" / "dogs", 1)
    write_folder(tmp_path / "train" / ".ipynb_checkpoints", 1)
    write_picture(tmp_path / "train" / "loose.png")
    write_folder(tmp_path / "reg" / "2_cat", 1)
    (spec,) = read_datasets(
        options_for(tmp_path / "train", reg_data_dir=str(tmp_path / "reg"), keep_tokens=2)
    )
    cat, reg = spec.subsets
    assert (cat.num_repeats, cat.class_tokens, cat.is_reg) == (10, "sks cat_toy", False)
    assert (reg.num_repeats, reg.class_tokens, reg.is_reg) == (2, "cat", True)
    assert cat.keep_tokens == 2
    assert len(spec.notes) == 2
    assert "rename the folder to '1_dogs'" in spec.notes[0]
    assert "1 pictures lie in" in spec.notes[1]


def test_the_folder_itself_instead_of_its_parent_is_explained(tmp_path: Path) -> None:
    write_folder(tmp_path / "10_cat", 3)
    with pytest.raises(UserError) as caught:
        read_datasets(options_for(tmp_path / "10_cat"))
    assert f"give its parent, --train_data_dir {tmp_path}" in str(caught.value)
    write_folder(tmp_path / "loose", 3)
    with pytest.raises(UserError, match="move them to a folder"):
        read_datasets(options_for(tmp_path / "loose"))


def test_missing_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--train_data_dir nowhere: there is no such folder"):
        read_datasets(options_for("nowhere"))
    with pytest.raises(UserError, match="there is nothing to train on"):
        read_datasets(options_for())
    write_folder(tmp_path / "project" / "cats", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="it does exist beside the config"):
        config(tmp_path / "project", "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cats'")


def test_metadata_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{}")
    options = options_for(tmp_path, in_json=str(tmp_path / "m.json"), dataset_repeats=3)
    (spec,) = read_datasets(options)
    (subset,) = spec.subsets
    assert (subset.metadata_file, subset.image_dir) == (options.in_json, str(tmp_path))
    assert subset.num_repeats == 3
    with pytest.raises(UserError, match="--in_json nowhere: there is no such file"):
        read_datasets(options_for(tmp_path, in_json="nowhere"))


def test_mistakes_of_the_command_line_are_not_told_as_the_configs(folder: Path) -> None:
    write_folder(folder / "1_cat", 1)
    with pytest.raises(UserError, match=r"^the dataset: min_bucket_reso 256 is above"):
        read_datasets(options_for(folder, enable_bucket=True))


def test_bad_values_on_the_command_line(folder: Path) -> None:
    options = options_for(folder, resolution="64,64,64", face_crop_aug_range="4,2")
    write_folder(folder / "1_cat", 1)
    with pytest.raises(UserError) as caught:
        read_datasets(options)
    assert "--resolution: expected a size" in str(caught.value)
    assert "--face_crop_aug_range: expected two factors" in str(caught.value)
