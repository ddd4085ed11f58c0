"""From a picture file to the pixels that a step trains on: open, resize, crop, augment."""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.training.buckets import Placement, Size, cover
from library.training.dataset_config import SubsetSpec
from library.training.errors import UserError
from library.training.picture_files import DECODING_ERRORS, orientation
from library.training.randomness import python_stream

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    # Of Pillow's filters the one that comes nearest to averaging over each new pixel's area.
    "area": Image.Resampling.HAMMING,
}

_UPRIGHT = {  # what each EXIF orientation asks for
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Window:
    """Where a picture is cut out: it is scaled to `resized`, then cut at (left, top)."""

    resized: Size
    left: int
    top: int


@dataclass
class Picture:
    """A picture ready for the VAE."""

    pixels: Tensor  # [3, H, W] float32 in [-1, 1]
    mask: Tensor | None  # [1, H, W] float32 in [0, 1], 1 where the loss counts
    crop: tuple[int, int]  # (top, left) of the cut in the scaled picture
    content: str  # hash of the file


def content_hash(data: bytes) -> str:
    """The key of a file's content."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def prepare(
    path: str,
    mask_path: str | None,
    subset: SubsetSpec,
    placement: Placement,
    seed: int | None = None,
    flipped: bool = False,
) -> Picture:
    """Open a picture and bring it to its bucket's size, augmented as the subset says.

    Args:
        mask_path: the mask picture that belongs to it, if there is one; its red channel counts.
            Without one, `subset.alpha_mask` takes the mask from the picture's transparency.
        seed: of the sample, for random crops and colours; None for the plain, centred picture.
        flipped: mirror it left to right.
    """
    image, alpha, content = open_picture(path)
    window = _window(path, image.size, subset, placement, seed)
    image = _cut(image, window, placement.bucket, subset.resize_interpolation)
    if subset.color_aug and seed is not None:
        image = vary_colors(image, python_stream(seed, "color"))
    mask = open_picture(mask_path)[0].getchannel("R") if mask_path is not None else alpha
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    weights = None
    if mask_path is not None or subset.alpha_mask:
        weights = torch.ones(1, *pixels.shape[1:])
        if mask is not None:
            mask = _cut(mask, window, placement.bucket, subset.resize_interpolation)
            weights = torch.from_numpy(np.array(mask))[None].float() / 255
    left = window.left
    if flipped:
        pixels = pixels.flip(-1)
        weights = weights.flip(-1) if weights is not None else None
        left = window.resized[0] - placement.bucket[0] - left
    return Picture(pixels.contiguous(), weights, (window.top, left), content)


def open_picture(path: str) -> tuple[Image.Image, Image.Image | None, str]:
    """A picture the right way up: its colours (RGB), its transparency (L, if any), its hash.

    Transparent parts keep the colour that the file has there, as in sd-scripts.
    """
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            turn = _UPRIGHT.get(orientation(image))
            upright = image.transpose(turn) if turn is not None else image.copy()
    except DECODING_ERRORS as error:
        raise UserError(
            f"{path}: the picture cannot be decoded ({error}): repair, replace or remove it"
        ) from None
    if upright.mode.startswith("I;16") or upright.mode == "I":  # Pillow clips instead of scaling
        upright = Image.fromarray((np.array(upright) >> 8).astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB"), None, content_hash(data)
    upright = upright.convert("RGBA")
    return upright.convert("RGB"), upright.getchannel("A"), content_hash(data)


def centre_crop(placement: Placement) -> tuple[int, int]:
    """(top, left) of the cut when nothing is random."""
    window = _centred(placement)
    return window.top, window.left


def _centred(placement: Placement) -> Window:
    (width, height), bucket = placement.resized, placement.bucket
    return Window(placement.resized, (width - bucket[0]) // 2, (height - bucket[1]) // 2)


def _window(
    path: str, size: Size, subset: SubsetSpec, placement: Placement, seed: int | None
) -> Window:
    """Where to cut: around the face, at a random place, or in the middle."""
    if seed is None or not (subset.random_crop or subset.face_crop_aug_range):
        return _centred(placement)
    rng = python_stream(seed, "crop")
    face = face_of(path)
    if face is not None and subset.face_crop_aug_range is not None:
        return face_window(face, size, subset, placement.bucket, rng)
    if not subset.random_crop:
        return _centred(placement)
    (width, height), bucket = placement.resized, placement.bucket
    left, top = rng.randint(0, width - bucket[0]), rng.randint(0, height - bucket[1])
    return Window(placement.resized, left, top)


def _cut(
    image: Image.Image, window: Window, bucket: Size, interpolation: str | None
) -> Image.Image:
    """`image` scaled and cropped. Without `interpolation`: area to shrink, lanczos to enlarge."""
    if image.size != window.resized:
        shrinks = image.size[0] >= window.resized[0] and image.size[1] >= window.resized[1]
        name = interpolation or ("area" if shrinks else "lanczos")
        image = image.resize(window.resized, _FILTERS[name])
    left, top = window.left, window.top
    return image.crop((left, top, left + bucket[0], top + bucket[1]))


@dataclass(frozen=True)
class Face:
    """A face's centre and size in pixels of its picture."""

    x: int
    y: int
    width: int
    height: int


def face_of(path: str) -> Face | None:
    """The face that a file's name tells of: `name_x_y_width_height.png`."""
    stem = os.path.splitext(os.path.basename(path))[0]
    found = re.search(r"_(\d+)_(\d+)_(\d+)_(\d+)$", stem)
    if found is None:
        return None
    face = Face(*(int(part) for part in found.groups()))
    return face if face.x > 0 and max(face.width, face.height) > 0 else None


def face_window(
    face: Face, size: Size, subset: SubsetSpec, bucket: Size, rng: random.Random
) -> Window:
    """A cut around a face, as large in it as `face_crop_aug_range` says, as in sd-scripts.

    The range is that of the bucket's shorter side over the face's longer side. Pictures are never
    enlarged for it beyond what the bucket needs. With `random_crop` the face is near the middle
    more often than at the border; otherwise it is moved by up to a twentieth of its size.
    """
    low, high = subset.face_crop_aug_range or (1.0, 1.0)
    length = max(face.width, face.height)
    shorter = min(bucket)
    least = max(bucket[0] / size[0], bucket[1] / size[1])
    smallest = max(least, min(1.0, shorter / (length * high)))
    largest = max(smallest, min(1.0, shorter / (length * low)))
    scale = rng.uniform(smallest, largest)
    resized = cover(size, bucket) if scale == least else _scaled(size, scale, bucket)
    jitter = length // 20 if low != high and length > shorter // 10 and length >= 40 else 0
    starts = []
    for axis, centre in enumerate((face.x, face.y)):
        middle = int(centre * scale + 0.5)
        start = middle - bucket[axis] // 2
        if subset.random_crop:
            reach = max(resized[axis] - middle, middle)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif jitter:
            start += rng.randint(-jitter, jitter)
        starts.append(max(0, min(start, resized[axis] - bucket[axis])))
    return Window(resized, starts[0], starts[1])


def _scaled(size: Size, scale: float, least: Size) -> Size:
    width, height = (int(length * scale + 0.5) for length in size)
    return max(width, least[0]), max(height, least[1])


def vary_colors(image: Image.Image, rng: random.Random) -> Image.Image:
    """One time in three a little variation: of the hue by ±16°, or a gamma from 0.95 to 1.05."""
    if rng.random() > 0.33:
        return image
    if rng.random() > 0.5:
        shift = round(rng.uniform(-16, 16) / 360 * 256)
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    gamma = rng.uniform(0.95, 1.05)
    levels = [round(255 * math.pow(level / 255, gamma)) for level in range(256)]
    return image.point(levels * 3)
