"""Batches of training data by epoch and index: the same wherever and whenever they are made."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_folders import batches, options_for, write_folder, write_picture
from tiny_vae import TinyVae

from library.training.data import Batch, TrainingData
from library.training.errors import UserError
from library.training.options import Options


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


def test_an_epoch_holds_every_repeat_once(dreambooth_dir: Path) -> None:
    options = options_for(dreambooth_dir, train_batch_size=3, max_data_loader_n_workers=0)
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


def test_a_resume_in_mid_epoch_goes_on_with_the_same_batches(dreambooth_dir: Path) -> None:
    options = lively(dreambooth_dir)
    data, _ = TrainingData.open(options)
    whole = batches(data, options, epochs=3)
    resumed = batches(TrainingData.open(options)[0], options, start=(1, 3), epochs=3)
    assert [item[:2] for item in resumed] == [item[:2] for item in whole[10:]]
    assert all(same(a[2], b[2]) for a, b in zip(resumed, whole[10:], strict=True))
    assert batches(data, options, start=(2, 7), epochs=3) == []


def test_workers_bring_what_the_main_process_would(dreambooth_dir: Path) -> None:
    options = lively(dreambooth_dir)
    data, _ = TrainingData.open(options)
    alone = batches(data, options, epochs=2)
    options.max_data_loader_n_workers = 2
    helped = batches(data, options, epochs=2)
    assert [item[:2] for item in helped] == [item[:2] for item in alone]
    assert all(same(a[2], b[2]) for a, b in zip(helped, alone, strict=True))


def test_a_sample_is_the_same_in_any_batch_and_process(dreambooth_dir: Path) -> None:
    options = lively(dreambooth_dir)
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


def test_the_seed_decides_everything(dreambooth_dir: Path) -> None:
    data, _ = TrainingData.open(lively(dreambooth_dir))
    runs = [batches(data, lively(dreambooth_dir, seed=seed)) for seed in (7, 7, 8)]
    assert all(same(a[2], b[2]) for a, b in zip(runs[0], runs[1], strict=True))
    assert names(runs[0]) != names(runs[2])


def test_the_loader_leaves_torchs_random_state_alone(dreambooth_dir: Path) -> None:
    options = lively(dreambooth_dir)
    data, _ = TrainingData.open(options)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(data, options)
    assert torch.equal(torch.get_rng_state(), before)


def test_moving_the_folder_changes_nothing(dreambooth_dir: Path, tmp_path: Path) -> None:
    before = batches(TrainingData.open(lively(dreambooth_dir))[0], lively(dreambooth_dir))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (dreambooth_dir / "2_cat").rename(moved / "2_cat")
    after = batches(TrainingData.open(lively(moved))[0], lively(moved))
    assert [item[2].seeds for item in after] == [item[2].seeds for item in before]
    assert names(after) == names(before)


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_and_uncached_latents_agree(dreambooth_dir: Path, to_disk: bool) -> None:
    plain = options_for(
        dreambooth_dir,
        flip_aug=True,
        train_batch_size=2,
        max_data_loader_n_workers=1 if to_disk else 0,
    )
    cached = options_for(
        dreambooth_dir,
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


def test_data_pickles_for_spawned_workers(dreambooth_dir: Path) -> None:
    options = lively(dreambooth_dir)
    data, _ = TrainingData.open(options)
    samples = data.loader(options, (0, 0), 1, 0, 1).dataset
    assert same(pickle.loads(pickle.dumps(samples)).batch(0, 1), samples.batch(0, 1))


def test_what_cannot_be_cached_is_said_before_anything_is_read(dreambooth_dir: Path) -> None:
    with pytest.raises(UserError, match=r"2_cat: latents cannot be cached with color_aug"):
        TrainingData.open(lively(dreambooth_dir, cache_latents=True))


def test_sizes_must_fit_the_latent_grid(dreambooth_dir: Path) -> None:
    options = options_for(dreambooth_dir, resolution="62")
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


def test_validation_is_apart_and_always_the_same(dreambooth_dir: Path) -> None:
    options = lively(dreambooth_dir, validation_split=0.3, validation_seed=3)
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
    again = TrainingData.open(lively(dreambooth_dir, validation_split=0.3, validation_seed=3))[1]
    assert again is not None
    assert [record.path for record in again.records] == [
        record.path for record in validation.records
    ]
    # The last of a shuffle by the validation seed, as in sd-scripts.
    order = [f"{index:02}.png" for index in range(7)]
    random.Random(3).shuffle(order)
    assert {os.path.basename(path) for path in apart} == set(order[5:])
    other = TrainingData.open(lively(dreambooth_dir, validation_split=0.3, validation_seed=4))[1]
    assert other is not None
    assert {record.path for record in other.records} != apart


def test_a_picture_that_breaks_later_stops_the_loader_with_its_name(dreambooth_dir: Path) -> None:
    options = options_for(dreambooth_dir, max_data_loader_n_workers=1)
    data, _ = TrainingData.open(options)
    for path in (dreambooth_dir / "2_cat").glob("*.png"):
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


def test_token_warm_up_follows_the_steps(tmp_path: Path) -> None:
    write_picture(tmp_path / "8_cat" / "a.png", caption="a, b, c, d")
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
