"""Training data: pictures found and checked, batches by epoch and index, validation apart."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_folders import damage, options_for, picture, write_folder, write_picture
from tiny_vae import TinyVae

from library.training import picture_files
from library.training.data import Batch, TrainingData
from library.training.errors import UserError
from library.training.options import Options


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures, twice each."""
    write_folder(tmp_path / "2_cat", 7)
    return tmp_path


def batches(
    data: TrainingData,
    options: Options,
    start: tuple[int, int] = (0, 0),
    epochs: int = 1,
    process: int = 0,
    processes: int = 1,
) -> list[tuple[int, int, Batch]]:
    loader = data.loader(options, start, epochs, process, processes)
    items = list(loader)
    assert len(items) == len(loader)
    return items


def names(items: list[tuple[int, int, Batch]]) -> list[list[str]]:
    return [[os.path.basename(path) for path in batch.paths] for _, _, batch in items]


def same(left: Batch, right: Batch) -> bool:
    """Whether two batches are equal to the bit."""
    pairs = [(getattr(left, name), getattr(right, name)) for name in vars(left)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def lively(folder: Path, **changes: Any) -> Options:
    """Options with everything left to chance that can be."""
    return options_for(
        folder,
        train_batch_size=2,
        shuffle_caption=True,
        caption_dropout_rate=0.2,
        flip_aug=True,
        random_crop=True,
        color_aug=True,
        max_data_loader_n_workers=0,
        **changes,
    )


def test_an_epoch_holds_every_repeat_once(folder: Path) -> None:
    options = options_for(folder, train_batch_size=3, max_data_loader_n_workers=0)
    data, validation = TrainingData.open(options)
    assert validation is None
    assert data.steps_per_epoch(1) == 5
    items = batches(data, options, epochs=2)
    assert [(epoch, index) for epoch, index, _ in items] == [
        (e, i) for e in (0, 1) for i in range(5)
    ]
    first, second = names(items[:5]), names(items[5:])
    for epoch in (first, second):
        assert sorted(name for batch in epoch for name in batch) == sorted(
            2 * [f"{index:02}.png" for index in range(7)]
        )
    assert first != second
    batch = items[0][2]
    assert batch.images is not None
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.images.min() >= -1
    assert batch.latents is None
    assert batch.masks is None
    assert batch.captions[0] == f"icon, number {int(os.path.basename(batch.paths[0])[:2])}"
    assert batch.original_sizes.tolist() == batch.target_sizes.tolist() == [[64, 64]] * 3


def test_a_resume_in_mid_epoch_goes_on_with_the_same_batches(folder: Path) -> None:
    options = lively(folder)
    data, _ = TrainingData.open(options)
    whole = batches(data, options, epochs=3)
    resumed = batches(TrainingData.open(options)[0], options, start=(1, 3), epochs=3)
    assert [item[:2] for item in resumed] == [item[:2] for item in whole[10:]]
    assert all(same(a[2], b[2]) for a, b in zip(resumed, whole[10:], strict=True))
    assert batches(data, options, start=(2, 7), epochs=3) == []


def test_workers_bring_what_the_main_process_would(folder: Path) -> None:
    options = lively(folder)
    data, _ = TrainingData.open(options)
    alone = batches(data, options, epochs=2)
    options.max_data_loader_n_workers = 2
    helped = batches(data, options, epochs=2)
    assert [item[:2] for item in helped] == [item[:2] for item in alone]
    assert all(same(a[2], b[2]) for a, b in zip(helped, alone, strict=True))


def test_a_sample_is_the_same_in_any_batch_and_process(folder: Path) -> None:
    options = lively(folder)
    data, _ = TrainingData.open(options)

    def by_seed(items: list[tuple[int, int, Batch]]) -> dict[int, tuple[str, Any]]:
        return {
            batch.seeds[place]: (batch.captions[place], batch.images[place].sum().item())
            for _, _, batch in items
            for place in range(len(batch.paths))
            if batch.images is not None
        }

    one = by_seed(batches(data, options))
    two = [batches(data, options, process=process, processes=2) for process in (0, 1)]
    assert len(one) == 14
    assert by_seed(two[0] + two[1]) == one
    assert by_seed(batches(data, options, start=(1, 0), epochs=2)).keys().isdisjoint(one)


def test_the_seed_decides_everything(folder: Path) -> None:
    data, _ = TrainingData.open(lively(folder))
    runs = [batches(data, lively(folder, seed=seed)) for seed in (7, 7, 8)]
    assert all(same(a[2], b[2]) for a, b in zip(runs[0], runs[1], strict=True))
    assert names(runs[0]) != names(runs[2])


def test_the_loader_leaves_torchs_random_state_alone(folder: Path) -> None:
    options = lively(folder)
    data, _ = TrainingData.open(options)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(data, options)
    assert torch.equal(torch.get_rng_state(), before)


def test_moving_the_folder_changes_nothing(folder: Path, tmp_path: Path) -> None:
    before = batches(TrainingData.open(lively(folder))[0], lively(folder))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (folder / "2_cat").rename(moved / "2_cat")
    after = batches(TrainingData.open(lively(moved))[0], lively(moved))
    assert [item[2].seeds for item in after] == [item[2].seeds for item in before]
    assert names(after) == names(before)


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_and_uncached_latents_agree(folder: Path, to_disk: bool) -> None:
    plain = options_for(
        folder, flip_aug=True, train_batch_size=2, max_data_loader_n_workers=1 if to_disk else 0
    )
    cached = options_for(
        folder,
        flip_aug=True,
        train_batch_size=2,
        cache_latents=True,
        cache_latents_to_disk=to_disk,
        vae_batch_size=4,
        max_data_loader_n_workers=1,
    )
    model = TinyVae()
    data, _ = TrainingData.open(cached)
    data.cache_latents(model, cached)
    uncached = batches(TrainingData.open(plain)[0], plain)
    for (_, _, left), (_, _, right) in zip(batches(data, cached), uncached, strict=True):
        assert left.latents is not None
        assert right.images is not None
        expected = model.encode_images(right.images, right.latent_seeds)
        assert torch.allclose(left.latents, expected, atol=1e-5)
        assert left.images is None
        assert left.seeds == right.seeds
        assert torch.equal(left.crop_top_lefts, right.crop_top_lefts)
    loader = data.loader(cached, (0, 0), 1, 0, 1)
    assert loader.num_workers == (1 if to_disk else 0)


def test_data_pickles_for_spawned_workers(folder: Path) -> None:
    options = lively(folder)
    data, _ = TrainingData.open(options)
    samples = data.loader(options, (0, 0), 1, 0, 1).dataset
    assert same(pickle.loads(pickle.dumps(samples)).batch(0, 1), samples.batch(0, 1))


def test_what_cannot_be_cached_is_said_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(UserError, match=r"2_cat: latents cannot be cached with color_aug"):
        TrainingData.open(lively(folder, cache_latents=True))


def test_sizes_must_fit_the_latent_grid(folder: Path) -> None:
    options = options_for(folder, resolution="62")
    with pytest.raises(UserError, match=r"62×62.*4×4 pixels"):
        TrainingData.open(options)[0].cache_latents(TinyVae(), options)


def test_pictures_of_one_shape_share_a_batch(tmp_path: Path) -> None:
    for index, size in enumerate([(64, 64), (90, 60), (64, 64), (96, 64), (60, 90)]):
        write_picture(tmp_path / "1_cat" / f"{index}.png", size, seed=index)
    options = options_for(
        tmp_path,
        enable_bucket=True,
        min_bucket_reso=32,
        bucket_reso_steps=16,
        train_batch_size=4,
        max_data_loader_n_workers=0,
    )
    data, _ = TrainingData.open(options)
    groups = {tuple(sorted(each)) for each in names(batches(data, options))}
    assert groups == {("0.png", "2.png"), ("1.png", "3.png"), ("4.png",)}
    assert data.sets[0].bucket_counts() == {(48, 80): 1, (64, 64): 2, (80, 48): 2}
    wide = next(batch for _, _, batch in batches(data, options) if "1.png" in batch.paths[0])
    assert wide.target_sizes.tolist()[0] == [48, 80]
    assert wide.images is not None
    assert wide.images.shape[2:] == (48, 80)


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


def test_validation_is_apart_and_always_the_same(folder: Path) -> None:
    options = lively(folder, validation_split=0.3, validation_seed=3)
    data, validation = TrainingData.open(options)
    assert validation is not None
    kept, apart = ({record.path for record in each.records} for each in (data, validation))
    assert len(apart) == 2
    assert not kept & apart
    assert len(kept | apart) == 7
    first, second = (
        [batch for epoch, _, batch in batches(validation, options, epochs=2) if epoch == chosen]
        for chosen in (0, 1)
    )
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    paths = [path for batch in first for path in batch.paths]
    assert paths == sorted(apart)
    assert all(caption != "" for batch in first for caption in batch.captions)
    again = TrainingData.open(lively(folder, validation_split=0.3, validation_seed=3))[1]
    assert again is not None
    assert [record.path for record in again.records] == [
        record.path for record in validation.records
    ]
    # The last of a shuffle by the validation seed, as in sd-scripts.
    order = [f"{index:02}.png" for index in range(7)]
    random.Random(3).shuffle(order)
    assert {os.path.basename(path) for path in apart} == set(order[5:])
    other = TrainingData.open(lively(folder, validation_split=0.3, validation_seed=4))[1]
    assert other is not None
    assert {record.path for record in other.records} != apart


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


def test_all_broken_pictures_are_listed_and_can_be_skipped(folder: Path) -> None:
    (folder / "2_cat" / "a.png").write_text("no picture")
    (folder / "2_cat" / "b.jpg").touch()
    whole = (folder / "2_cat" / "00.png").read_bytes()
    (folder / "2_cat" / "c.png").write_bytes(whole[:-30])
    with pytest.raises(UserError) as caught:
        TrainingData.open(options_for(folder))
    message = str(caught.value)
    assert message.startswith("3 problems:")
    for name, reason in (("a.png", "a text file"), ("b.jpg", "empty"), ("c.png", "incomplete")):
        assert any(name in line and reason in line for line in message.splitlines())
    assert "--skip_broken_images" in message
    data, _ = TrainingData.open(options_for(folder, skip_broken_images=True))
    assert len(data.records) == 7
    assert any("3 broken pictures are left out" in line for line in data.describe())


def test_pictures_damaged_in_the_middle_are_listed_too(folder: Path) -> None:
    for name in ("01.png", "04.png"):
        damage(folder / "2_cat" / name)
    with pytest.raises(UserError) as caught:
        TrainingData.open(options_for(folder))
    message = str(caught.value)
    assert message.startswith("2 problems:")
    for name in ("01.png", "04.png"):
        assert f"{name}: is damaged or incomplete" in message
    options = options_for(folder, skip_broken_images=True, max_data_loader_n_workers=0)
    data, _ = TrainingData.open(options)
    assert any("2 broken pictures are left out" in line for line in data.describe())
    assert sum(len(batch.paths) for _, _, batch in batches(data, options)) == 10


def test_bad_captions_and_folders_are_listed_together(folder: Path) -> None:
    (folder / "2_cat" / "03.txt").write_bytes(b"caf\xe9")
    (folder / "2_cat" / "04.txt").write_bytes(b"")
    (folder / "2_cat" / "05.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        TrainingData.open(options_for(folder))
    message = str(caught.value)
    assert "05.png: is empty" in message
    assert "03.txt: the caption is not UTF-8" in message
    assert "04.txt: the caption file is empty" in message


def test_a_folder_without_pictures_is_noted_if_others_have_some(folder: Path) -> None:
    write_picture(folder / "1_empty" / "inner" / "a.png")
    (folder / "3_text").mkdir()
    (folder / "3_text" / "a.txt").touch()
    data, _ = TrainingData.open(options_for(folder))
    assert len(data.records) == 7
    notes = [line for line in data.describe() if line.startswith("note: ")]
    assert any("1_empty: no pictures in it" in note and "inner has some" in note for note in notes)
    assert any("3_text: no pictures in it" in note and ".txt files" in note for note in notes)
    shutil.rmtree(folder / "2_cat")
    with pytest.raises(UserError) as caught:
        TrainingData.open(options_for(folder))
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


def test_a_picture_that_breaks_later_stops_the_loader_with_its_name(folder: Path) -> None:
    options = options_for(folder, max_data_loader_n_workers=1)
    data, _ = TrainingData.open(options)
    for path in (folder / "2_cat").glob("*.png"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError) as caught:
        batches(data, options)
    assert "cannot be decoded" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_masks(tmp_path: Path) -> None:
    write_picture(tmp_path / "1_cat" / "a.png", mode="RGBA")
    write_picture(tmp_path / "1_cat" / "b.png")
    options = options_for(
        tmp_path, alpha_mask=True, train_batch_size=2, max_data_loader_n_workers=0
    )
    data, _ = TrainingData.open(options)
    ((_, _, batch),) = batches(data, options)
    assert batch.masks is not None
    assert batch.masks.shape == (2, 1, 64, 64)
    seen = batch.paths.index(str(tmp_path / "1_cat" / "a.png"))
    assert batch.masks[seen].min() < 1
    assert batch.masks[1 - seen].min() == 1


def test_mask_pictures_are_matched_by_name_and_checked(folder: Path) -> None:
    write_folder(folder / "masks", 6)
    options = options_for(folder, masked_loss=True, conditioning_data_dir=str(folder / "masks"))
    with pytest.raises(UserError, match=r"no mask of the same name for 06\.png"):
        TrainingData.open(options)
    write_picture(folder / "masks" / "06.jpg", (100, 64))
    with pytest.raises(UserError, match=r"06\.jpg: the mask is 100×64, of another shape"):
        TrainingData.open(options)
    write_picture(folder / "masks" / "06.jpg", (128, 128))
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
    folder: Path, opened: list[str], cache_info: bool
) -> None:
    options = options_for(folder, cache_info=cache_info)
    TrainingData.open(options)
    assert len(opened) == 7
    opened.clear()
    TrainingData.open(options)
    assert opened == []
    write_picture(folder / "2_cat" / "01.png", (80, 60))
    data, _ = TrainingData.open(options)
    assert opened == ["01.png"]
    assert data.records[1].size == (80, 60)
    noted = folder / "2_cat" / "metadata_cache.json"
    assert noted.exists() == cache_info


def test_sizes_are_noted_as_sd_scripts_notes_them(folder: Path, opened: list[str]) -> None:
    options = options_for(folder, cache_info=True)
    TrainingData.open(options)
    file = folder / "2_cat" / "metadata_cache.json"
    noted = json.loads(file.read_text())
    assert len(noted) == 7
    entry = noted[str(folder / "2_cat" / "00.png")]
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


def test_masks_are_looked_at_once_too(folder: Path, opened: list[str]) -> None:
    write_folder(folder / "masks", 7)
    options = options_for(
        folder, masked_loss=True, conditioning_data_dir=str(folder / "masks"), cache_info=True
    )
    TrainingData.open(options)
    assert len(opened) == 14
    # sd-scripts takes every entry of this file for a picture to train on.
    assert len(json.loads((folder / "2_cat" / "metadata_cache.json").read_text())) == 7
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
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data, _ = TrainingData.open(options_for(folder))
    assert len(data.records) == 7
    assert "cannot be written" in data.describe()[-1]


def test_description_and_debugging(folder: Path) -> None:
    options = options_for(folder, shuffle_caption=True, train_batch_size=4)
    data, _ = TrainingData.open(options)
    lines = data.describe()
    assert lines[0] == "dataset 0: 64×64, batch size 4"
    assert lines[1] == f"  {folder / '2_cat'}: 7 pictures × 2, shuffle_caption"
    assert lines[2] == "7 pictures, 14 samples an epoch"
    shown = list(data.debug_lines(options))
    assert len(shown) == 14
    assert "loss weight 1, (height, width) (64, 64) cut at (0, 0) to (64, 64)" in shown[0]


def test_figures_for_the_metadata(folder: Path) -> None:
    (pictures,) = TrainingData.open(options_for(folder))[0].sets
    assert pictures.num_train_images == 14
    assert pictures.regularization_found == 0
    assert pictures.tag_frequency()["2_cat"]["icon"] == 7
    assert pictures.mean_aspect_error() == 0


def test_token_warm_up_follows_the_steps(tmp_path: Path) -> None:
    picture((64, 64)).save((tmp_path / "8_cat").mkdir() or tmp_path / "8_cat" / "a.png")
    (tmp_path / "8_cat" / "a.txt").write_text("a, b, c, d")
    options = options_for(
        tmp_path,
        token_warmup_step=0.5,
        max_train_epochs=2,
        gradient_accumulation_steps=2,
        max_data_loader_n_workers=0,
    )
    data, _ = TrainingData.open(options)
    counts = [
        len(batch.captions[0].split(", ")) for _, _, batch in batches(data, options, epochs=2)
    ]
    # 4 updates an epoch, 8 in all: all four tags from update 4 on.
    assert counts == [1, 1, 1, 1, 2, 2, 3, 3] + [4] * 8


def test_two_datasets_never_mix(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", 4)
    text = "".join(
        f"[[datasets]]\nresolution = {resolution}\nbatch_size = {size}\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\n"
        for resolution, size in ((64, 4), (32, 1))
    )
    (tmp_path / "data.toml").write_text(text)
    options = options_for(dataset_config=str(tmp_path / "data.toml"), max_data_loader_n_workers=0)
    data, _ = TrainingData.open(options)
    shapes = sorted(
        (*batch.target_sizes[0].tolist(), len(batch.paths))
        for _, _, batch in batches(data, options)
    )
    assert shapes == [(32, 32, 1)] * 4 + [(64, 64, 4)]
    seeds = [seed for _, _, batch in batches(data, options) for seed in batch.seeds]
    assert len(set(seeds)) == 8
