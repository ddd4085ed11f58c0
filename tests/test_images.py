"""Picture files: found, told apart from broken ones, opened, resized, cropped, varied."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_folders import damage, picture, write_picture
from PIL import Image, ImageOps

from library.training.buckets import Placement
from library.training.dataset_config import SubsetSpec
from library.training.errors import UserError
from library.training.images import (
    Face,
    centre_crop,
    face_of,
    face_window,
    open_picture,
    prepare,
    vary_colors,
)
from library.training.picture_files import BrokenPicture, find_pictures, inspect, inspect_all

FORMATS = ("png", "jpg", "webp", "bmp", "avif")


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, Path]:
    """One file of each way to be broken."""
    files: dict[str, Path] = {}

    def write(name: str, content: bytes) -> None:
        files[name] = tmp_path / name
        files[name].write_bytes(content)

    write("empty.png", b"")
    write("text.png", b"this is not a picture")
    write("page.jpg", b"<!DOCTYPE html><html>404</html>")
    write("phone.jpg", b"\0\0\0\x18ftypheic" + bytes(100))
    write("pointer.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    write("noise.webp", random.Random(0).randbytes(400))
    for ending in FORMATS:
        whole = write_picture(tmp_path / f"whole.{ending}", (80, 80)).read_bytes()
        write(f"half.{ending}", whole[: len(whole) * 2 // 3])
    return files


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.png", "is empty"),
        ("text.png", "a text file"),
        ("page.jpg", "a web page"),
        ("phone.jpg", "HEIC"),
        ("pointer.png", "git lfs pull"),
        ("noise.webp", "unknown format"),
        *((f"half.{ending}", "damaged or incomplete") for ending in FORMATS),
    ],
)
def test_a_broken_file_is_told_with_its_reason(
    broken: dict[str, Path], name: str, reason: str
) -> None:
    with pytest.raises(BrokenPicture, match=reason):
        inspect(str(broken[name]))


def test_a_missing_file_and_a_whole_list(broken: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BrokenPicture, match="does not exist"):
        inspect(str(tmp_path / "nowhere.png"))
    whole = str(tmp_path / "whole.png")
    infos = inspect_all([str(broken["text.png"]), whole, whole])
    assert [type(info).__name__ for info in infos.values()] == ["BrokenPicture", "PictureInfo"]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "avif"])
def test_a_file_damaged_in_the_middle_is_told(tmp_path: Path, ending: str) -> None:
    path = write_picture(tmp_path / f"a.{ending}", (300, 200))
    damage(path)
    with pytest.raises(UserError, match="cannot be decoded"):
        open_picture(str(path))
    with pytest.raises(BrokenPicture, match="damaged or incomplete"):
        inspect(str(path))


def test_a_wrong_checksum_behind_the_pixels_is_let_pass(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (50, 30))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert inspect(str(path)).size == open_picture(str(path))[0].size == (50, 30)


@pytest.mark.parametrize("ending", FORMATS)
def test_whole_files_of_every_format_are_sound(tmp_path: Path, ending: str) -> None:
    path = write_picture(tmp_path / f"a.{ending}", (50, 30))
    assert inspect(str(path)).size == (50, 30)


def test_found_by_ending_whatever_its_case(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.WebP", "notes.txt", "._a.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [Path(path).name for path in find_pictures(str(tmp_path))] == [
        "a.png",
        "b.JPG",
        "c.WebP",
    ]


def plain(path: Path, placement: Placement, **options: Any) -> Any:
    how = {name: options.pop(name) for name in ("seed", "flipped") if name in options}
    mask = options.pop("mask", None)
    return prepare(str(path), mask, SubsetSpec(**options), placement, **how)


SQUARE = Placement((64, 64), (64, 64))


def test_a_picture_of_the_right_size_comes_through_unchanged(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (64, 64))
    result = plain(path, SQUARE)
    expected = torch.from_numpy(np.array(picture((64, 64)))).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(result.pixels, expected)
    assert result.pixels.dtype == torch.float32
    assert result.mask is None
    assert result.crop == (0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "webp"])
def test_exif_orientation_turns_the_picture(tmp_path: Path, orientation: int, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture((40, 64)).save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    assert inspect(str(path)).size == expected.size
    assert np.array_equal(np.array(open_picture(str(path))[0]), np.array(expected))


def test_transparency_is_dropped_and_the_colours_below_it_stay(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (64, 64), mode="RGBA")
    opened, alpha, _ = open_picture(str(path))
    original = np.array(picture((64, 64), mode="RGBA"))
    assert np.array_equal(np.array(opened), original[..., :3])
    assert alpha is not None
    assert np.array_equal(np.array(alpha), original[..., 3])


def test_odd_modes_become_rgb(tmp_path: Path) -> None:
    grey16 = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
    grey16.save(tmp_path / "grey16.png")
    opened, _, _ = open_picture(str(tmp_path / "grey16.png"))
    assert np.array(opened)[-1, -1].tolist() == [255, 255, 255]
    assert np.array(opened).mean() == pytest.approx(127.5, abs=1)  # scaled, not clipped to white
    for mode in ("P", "LA", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        picture((16, 16)).convert(mode).save(path)
        assert open_picture(str(path))[0].mode == "RGB"


def test_area_when_it_shrinks_and_lanczos_when_it_grows(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (64, 64))
    smaller = plain(path, Placement((32, 32), (32, 32))).pixels
    average = torch.nn.functional.avg_pool2d(plain(path, SQUARE).pixels[None], 2)[0]
    assert (smaller - average).abs().mean() < 0.01
    larger = plain(path, Placement((96, 96), (96, 96)))
    named = plain(path, Placement((96, 96), (96, 96)), resize_interpolation="lanczos")
    assert torch.equal(larger.pixels, named.pixels)
    nearest = plain(path, Placement((96, 96), (96, 96)), resize_interpolation="nearest")
    assert not torch.equal(larger.pixels, nearest.pixels)


def test_centre_crop_and_flip(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (101, 64))
    placement = Placement((64, 64), (101, 64))
    result = plain(path, placement)
    whole = torch.from_numpy(np.array(picture((101, 64)))).permute(2, 0, 1) / 127.5 - 1
    assert result.crop == (0, 18) == centre_crop(placement)
    assert torch.equal(result.pixels, whole[:, :, 18:82])
    mirrored = plain(path, placement, flipped=True)
    assert torch.equal(mirrored.pixels, result.pixels.flip(-1))
    assert mirrored.crop == (0, 19)  # where the cut is in the mirrored picture


def test_random_crop_stays_inside_and_follows_its_seed(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (100, 90))
    placement = Placement((64, 64), (100, 90))
    crops = {plain(path, placement, random_crop=True, seed=seed).crop for seed in range(40)}
    assert len(crops) > 20
    assert all(0 <= top <= 26 and 0 <= left <= 36 for top, left in crops)
    again = [plain(path, placement, random_crop=True, seed=3) for _ in range(2)]
    assert torch.equal(again[0].pixels, again[1].pixels)


def test_mask_from_transparency(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (96, 64), mode="RGBA")
    placement = Placement((64, 64), (96, 64))
    result = plain(path, placement, alpha_mask=True)
    alpha = np.array(picture((96, 64), mode="RGBA"))[:, 16:80, 3] / 255
    assert result.mask.shape == (1, 64, 64)
    assert np.allclose(result.mask[0].numpy(), alpha)
    mirrored = plain(path, placement, alpha_mask=True, flipped=True)
    assert torch.equal(mirrored.mask, result.mask.flip(-1))
    opaque = write_picture(tmp_path / "b.png", (64, 64))
    assert plain(opaque, SQUARE, alpha_mask=True).mask.min() == 1


def test_mask_from_the_red_of_another_picture(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (64, 64))
    mask = write_picture(tmp_path / "masks" / "a.png", (64, 64), seed=5)
    red = np.array(picture((64, 64), seed=5))[..., 0] / 255
    assert np.allclose(plain(path, SQUARE, mask=str(mask)).mask[0].numpy(), red)


def test_colours_vary_a_little_one_time_in_three() -> None:
    original = picture((32, 32))
    results = [vary_colors(original, random.Random(seed)) for seed in range(300)]
    changed = [result for result in results if result.tobytes() != original.tobytes()]
    assert 60 < len(changed) < 140
    before = np.array(original).astype(float)
    differences = [np.abs(np.array(result) - before).mean() for result in changed]
    assert 0 < max(differences) < 40


def test_the_name_of_a_file_tells_of_its_face() -> None:
    assert face_of("/x/ann_lee_120_80_40_50.png") == Face(120, 80, 40, 50)
    assert face_of("ann_120_80.png") is None
    assert face_of("ann_120_80_0_0.png") is None


@pytest.mark.parametrize("random_crop", [False, True])
def test_a_face_crop_holds_the_face_at_the_asked_size(random_crop: bool) -> None:
    face = Face(300, 200, 100, 80)
    subset = SubsetSpec(face_crop_aug_range=(2.0, 4.0), random_crop=random_crop)
    for seed in range(50):
        window = face_window(face, (800, 600), subset, (256, 256), random.Random(seed))
        scale = window.resized[0] / 800
        assert 2.0 <= 256 / (100 * scale) <= 4.05 or scale == 1
        assert 0 <= window.left <= window.resized[0] - 256
        assert 0 <= window.top <= window.resized[1] - 256
        if not random_crop:
            assert abs(window.left + 128 - 300 * scale) < 8


def test_a_face_in_a_small_picture_is_scaled_up_to_the_bucket() -> None:
    subset = SubsetSpec(face_crop_aug_range=(1.0, 1.0))
    window = face_window(Face(20, 20, 30, 30), (50, 40), subset, (64, 64), random.Random(0))
    assert window.resized == (80, 64)


def test_a_picture_that_breaks_when_decoded_is_named(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (64, 64))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.png.*cannot be decoded"):
        open_picture(str(path))


def test_a_sound_png_is_known_by_its_checksums_without_torch_or_decoding(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", (64, 64))
    code = (
        "import sys\nfrom PIL import ImageFile\n"
        "def load(self): raise AssertionError('decoded')\n"
        "ImageFile.ImageFile.load = load\n"
        "from library.training.picture_files import inspect\n"
        f"print(inspect({str(path)!r}).size, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert result.stdout.strip() == "(64, 64) False"
