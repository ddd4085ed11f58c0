"""The latent cache: what is encoded, what is kept, and when it is made anew."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_folders import options_for, write_folder, write_picture
from safetensors.torch import load, load_file
from tiny_vae import TinyVae

from library.training.data import TrainingData
from library.training.errors import UserError
from library.training.images import prepare
from library.training.latents import cache_path, fill_cache, latent_seed


@pytest.fixture(scope="module")
def vae() -> TinyVae:
    return TinyVae()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "1_cat", 5)
    return tmp_path


def fill(folder: Path, model: TinyVae, options: dict[str, Any] | None = None, **how: Any) -> Any:
    """(training data, store, how many pictures were encoded)."""
    data, _ = TrainingData.open(options_for(folder, **(options or {})))
    before = model.encoded
    store = fill_cache(data.records, model, **{"to_disk": True, **how})
    return data, store, model.encoded - before


def files(folder: Path) -> list[Path]:
    return sorted((folder / "1_cat").glob("*.latents.safetensors"))


def test_cached_latents_are_those_of_the_picture(folder: Path, vae: TinyVae) -> None:
    data, in_memory, _ = fill(folder, vae, to_disk=False, batch_size=2)
    _, on_disk, _ = fill(folder, vae, batch_size=2)
    for record in data.records:
        picture = prepare(record.path, None, record.subset, record.placement)
        expected = vae.encode_images(picture.pixels[None], [latent_seed(picture.content)])[0]
        for store in (in_memory, on_disk):
            latents, mask = store.read(record, flipped=False)
            assert latents.shape == (4, 16, 16)
            assert latents.dtype == torch.float32
            assert torch.allclose(latents, expected, atol=1e-5)
            assert mask is None
    assert len(files(folder)) == 5
    assert not in_memory.read(data.records[0], False)[0].equal(
        in_memory.read(data.records[1], False)[0]
    )


def test_a_second_run_encodes_nothing(folder: Path, vae: TinyVae) -> None:
    assert fill(folder, vae)[2] == 5
    assert fill(folder, vae)[2] == 0
    # Copied files have other times, their content decides.
    for path in (folder / "1_cat").glob("*.png"):
        os.utime(path, (1, 1))
    assert fill(folder, vae)[2] == 0


def test_flipped_pictures_are_cached_too(folder: Path, vae: TinyVae) -> None:
    fill(folder, vae)
    data, store, encoded = fill(folder, vae, {"flip_aug": True}, batch_size=4)
    assert encoded == 10  # the files without them are made anew
    record = data.records[0]
    picture = prepare(record.path, None, record.subset, record.placement, flipped=True)
    expected = vae.encode_images(picture.pixels[None], [latent_seed(picture.content)])[0]
    assert torch.allclose(store.read(record, flipped=True)[0], expected, atol=1e-5)
    assert fill(folder, vae, {"flip_aug": True})[2] == 0
    assert fill(folder, vae)[2] == 0  # they serve without flip_aug as well


def test_a_changed_picture_is_encoded_anew(folder: Path, vae: TinyVae) -> None:
    data, before, _ = fill(folder, vae)
    old = before.read(data.records[2], False)[0]
    write_picture(folder / "1_cat" / "02.png", seed=99)
    data, store, encoded = fill(folder, vae)
    assert encoded == 1
    assert not torch.equal(store.read(data.records[2], False)[0], old)


def test_another_vae_or_resolution_or_filter_is_encoded_anew(folder: Path, vae: TinyVae) -> None:
    fill(folder, vae)
    other = TinyVae(seed=1)
    assert fill(folder, other)[2] == 5
    assert fill(folder, vae, {"resolution": "32"})[2] == 5
    assert fill(folder, vae, {"resolution": "32", "resize_interpolation": "nearest"})[2] == 5
    assert fill(folder, vae)[2] == 0  # the first files are still there


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file", None])
def test_a_torn_file_is_made_anew(folder: Path, vae: TinyVae, damage: bytes | None) -> None:
    fill(folder, vae)
    file = files(folder)[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-20] if damage is None else damage)
    assert fill(folder, vae)[2] == 1
    latents = load_file(file)["latents"]
    assert torch.equal(latents, load(whole)["latents"])  # the same as before, to the bit


def test_skip_cache_check_looks_for_the_files_only(folder: Path, vae: TinyVae) -> None:
    data, _, _ = fill(folder, vae)
    write_picture(folder / "1_cat" / "02.png", seed=99)
    files(folder)[0].write_bytes(b"torn")
    files(folder)[1].unlink()
    _, store, encoded = fill(folder, vae, trust_files=True)
    assert encoded == 1
    with pytest.raises(UserError, match=r"00\.png cannot be read.*without --skip_cache_check"):
        store.read(data.records[0], False)


def test_processes_share_the_work(folder: Path, vae: TinyVae) -> None:
    first = fill(folder, vae, process_index=0, num_processes=2)
    second = fill(folder, vae, process_index=1, num_processes=2)
    assert (first[2], second[2]) == (3, 2)
    for record in first[0].records:
        assert torch.isfinite(first[1].read(record, False)[0]).all()


def test_masks_are_cached_with_the_latents(tmp_path: Path, vae: TinyVae) -> None:
    write_picture(tmp_path / "1_cat" / "a.png", mode="RGBA", caption="a")
    write_picture(tmp_path / "1_cat" / "b.png", caption="b")
    data, store, _ = fill(tmp_path, vae, {"alpha_mask": True, "flip_aug": True})
    seen, opaque = data.records
    picture = prepare(seen.path, None, seen.subset, seen.placement)
    assert torch.equal(store.read(seen, False)[1], picture.mask)
    assert torch.equal(store.read(seen, True)[1], picture.mask.flip(-1))
    assert store.read(opaque, False)[1] is None


def test_a_changed_mask_picture_is_noticed(folder: Path, vae: TinyVae) -> None:
    masks = write_folder(folder / "masks", 5)
    options = {"masked_loss": True, "conditioning_data_dir": str(folder / "masks")}
    assert fill(folder, vae, options)[2] == 5
    write_picture(masks[3], seed=50)
    data, store, encoded = fill(folder, vae, options)
    assert encoded == 1
    record = data.records[3]
    picture = prepare(record.path, record.mask_path, record.subset, record.placement)
    assert torch.equal(store.read(record, False)[1], picture.mask)


def test_latents_that_are_not_finite_stop_it_with_the_pictures_names(folder: Path) -> None:
    model = TinyVae()
    model.vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"00\.png, .*01\.png: not finite"):
        fill(folder, model, batch_size=2)
    assert files(folder) == []


def test_progress_counts_to_the_end(folder: Path, vae: TinyVae) -> None:
    calls: list[tuple[int, int]] = []
    fill(folder, vae, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 5) for done in range(6)]
    calls.clear()
    fill(folder, vae, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 5)]


def test_a_file_that_cannot_be_written_is_explained(folder: Path, vae: TinyVae) -> None:
    data, _, _ = fill(folder, vae)
    path = cache_path(data.records[0], vae.vae_key)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"00\.png.*cannot be written.*--cache_latents"):
        fill(folder, vae)


def test_files_have_the_picture_and_size_in_their_names(folder: Path, vae: TinyVae) -> None:
    data, _, _ = fill(folder, vae)
    name = cache_path(data.records[0], vae.vae_key).name
    assert name.startswith("00.png.64x64-")
    assert not list((folder / "1_cat").glob(".*"))  # nothing is left beside them
