"""Buckets: which sizes there are and where a picture goes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.training.buckets import Buckets, Placement, cover, place_fixed

sizes = st.tuples(st.integers(16, 3000), st.integers(16, 3000))


def test_sizes_of_stock_at_512() -> None:
    sizes = Buckets((512, 512), 256, 1024, 64).sizes
    assert sizes[0] == (256, 832)
    assert sizes[3] == (256, 1024)
    assert (512, 512) in sizes
    assert (448, 576) in sizes
    assert (576, 448) in sizes
    assert len(sizes) == 17
    assert all(width * height <= 512 * 512 for width, height in sizes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), Placement((512, 512), (512, 512))),
        ((1000, 1000), Placement((512, 512), (512, 512))),
        ((1600, 900), Placement((640, 384), (683, 384))),
        ((900, 1600), Placement((384, 640), (384, 683))),
        ((100, 4000), Placement((256, 1024), (256, 10240))),
    ],
)
def test_a_picture_goes_where_stock_puts_it(size: tuple[int, int], expected: Placement) -> None:
    assert Buckets((512, 512), 256, 1024, 64).place(size) == expected


@settings(deadline=None)  # a busy machine is no failure
@given(sizes)
def test_a_scaled_picture_covers_its_bucket_and_touches_it(size: tuple[int, int]) -> None:
    buckets = Buckets((512, 512), 256, 1024, 64)
    placement = buckets.place(size)
    assert placement.bucket in buckets.sizes
    assert placement.resized[0] >= placement.bucket[0]
    assert placement.resized[1] >= placement.bucket[1]
    touches = [a == b for a, b in zip(placement.resized, placement.bucket, strict=True)]
    assert any(touches)


@settings(deadline=None)  # a busy machine is no failure
@given(sizes)
def test_without_upscaling_nothing_grows_and_little_is_cut(size: tuple[int, int]) -> None:
    buckets = Buckets((512, 512), steps=64, no_upscale=True)
    try:
        placement = buckets.place(size)
    except ValueError:
        assert min(size) < 128 or max(size) / min(size) > 8
        return
    for length, resized, bucket in zip(size, placement.resized, placement.bucket, strict=True):
        assert resized <= length
        assert bucket % 64 == 0
        assert 0 <= resized - bucket < 64
    if size[0] * size[1] <= 512 * 512:
        assert placement.resized == size


def test_a_picture_too_small_for_one_step_is_explained() -> None:
    with pytest.raises(ValueError, match=r"40×300 is too small.*bucket_reso_steps 64"):
        Buckets((512, 512), no_upscale=True).place((40, 300))
    with pytest.raises(ValueError, match="too narrow"):
        Buckets((64, 64), 64, 1024, 64, no_upscale=True).place((3000, 100))


@pytest.mark.parametrize("steps", [4, 16, 32, 64])
def test_tiny_models_have_buckets_too(steps: int) -> None:
    buckets = Buckets((64, 64), steps, 256, steps)
    assert buckets.place((300, 300)).bucket == (64, 64)
    assert buckets.place((300, 200)).bucket[0] % steps == 0


def test_fixed_size() -> None:
    assert place_fixed((200, 100), (64, 64), False) == Placement((64, 64), (128, 64))
    # A random crop shows details at their own scale, where there is enough picture for it.
    assert place_fixed((200, 100), (64, 64), True) == Placement((64, 64), (200, 100))
    assert place_fixed((200, 40), (64, 64), True) == Placement((64, 64), (320, 64))


def test_cover_matches_the_tighter_side() -> None:
    assert cover((100, 50), (64, 64)) == (128, 64)
    assert cover((50, 100), (64, 64)) == (64, 128)
