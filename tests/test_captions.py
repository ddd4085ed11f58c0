"""Captions: what becomes of a raw caption, option by option."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.training.captions import caption_path, read_caption, replace_wildcards, vary_caption
from library.training.dataset_config import SubsetSpec
from library.training.errors import UserError

RAW = "cat, red, small, on a mat"


def vary(raw: str = RAW, seed: int = 0, epoch: int = 0, step: int = 0, **options: Any) -> str:
    subset = SubsetSpec(**options)
    return vary_caption(raw, subset, random.Random(seed), epoch, step, max_steps=100)


def test_a_plain_caption_is_left_alone() -> None:
    assert vary("  odd ,spacing,, kept ") == "  odd ,spacing,, kept "


def test_shuffling_moves_all_but_the_kept_tags() -> None:
    seen = {vary(seed=seed, shuffle_caption=True, keep_tokens=1) for seed in range(60)}
    assert len(seen) == 6
    assert all(caption.startswith("cat, ") for caption in seen)
    assert all(sorted(caption.split(", ")) == sorted(RAW.split(", ")) for caption in seen)


def test_the_same_stream_gives_the_same_caption() -> None:
    options: dict[str, Any] = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.5}
    assert vary(seed=3, **options) == vary(seed=3, **options)


def test_keep_tokens_separator_keeps_both_ends() -> None:
    raw = "aaa, bbb ||| ccc, ddd, eee ||| fff, ggg"
    options: dict[str, Any] = {"keep_tokens_separator": "|||", "shuffle_caption": True}
    seen = {vary(raw, seed=seed, **options) for seed in range(60)}
    assert len(seen) == 6
    assert all(each.startswith("aaa, bbb, ") and each.endswith(", fff, ggg") for each in seen)
    # Nothing shuffled: the separator still is no word of the caption.
    assert vary(raw, keep_tokens_separator="|||") == "aaa, bbb, ccc, ddd, eee, fff, ggg"
    assert vary("no, separator", keep_tokens_separator="|||") == "no, separator"


def test_tags_drop_out_at_their_rate_and_kept_ones_never() -> None:
    counts: Counter[str] = Counter()
    for seed in range(2000):
        counts.update(vary(seed=seed, caption_tag_dropout_rate=0.3, keep_tokens=1).split(", "))
    assert counts["cat"] == 2000
    for tag in ("red", "small", "on a mat"):
        assert counts[tag] / 2000 == pytest.approx(0.7, abs=0.04)


def test_captions_drop_out_at_their_rate() -> None:
    empty = sum(vary(seed=seed, caption_dropout_rate=0.25) == "" for seed in range(2000))
    assert empty / 2000 == pytest.approx(0.25, abs=0.04)


def test_captions_drop_out_every_nth_epoch_counted_from_one() -> None:
    dropped = [vary(epoch=epoch, caption_dropout_every_n_epochs=3) == "" for epoch in range(6)]
    assert dropped == [False, False, True, False, False, True]


def test_warm_up_brings_in_tags_one_by_one() -> None:
    def tags(step: int, **options: Any) -> int:
        return len(vary("a, b, c, d, e", step=step, **options).split(", "))

    assert [tags(step, token_warmup_step=8) for step in (0, 2, 4, 7, 8, 50)] == [1, 2, 3, 4, 5, 5]
    assert tags(0, token_warmup_step=8, token_warmup_min=3) == 3
    assert [tags(step, token_warmup_step=0.5) for step in (0, 25, 50)] == [1, 3, 5]
    assert vary("a, b, c", step=0, token_warmup_step=8) == "a"


def test_secondary_separator_holds_tags_together() -> None:
    raw = "cat, sky;;;cloud;;;day, mat"
    for seed in range(20):
        caption = vary(raw, seed=seed, shuffle_caption=True, secondary_separator=";;;")
        assert "sky,cloud,day" in caption
    assert vary(raw, secondary_separator=";;;") == "cat, sky,cloud,day, mat"


def test_other_separator() -> None:
    caption = vary("a b; c; d", caption_separator=";", keep_tokens=1, shuffle_caption=True)
    assert caption in ("a b, c, d", "a b, d, c")


def test_prefix_and_suffix() -> None:
    assert vary("cat", caption_prefix="photo of", caption_suffix="by me") == "photo of cat by me"


def test_several_lines() -> None:
    raw = "first, line\nsecond\n\nthird"
    assert vary(raw) == "first, line"
    seen = {vary(raw, seed=seed, enable_wildcard=True) for seed in range(40)}
    assert seen == {"first, line", "second", "third"}
    # Prefix and suffix belong to the line that is used.
    framed: dict[str, Any] = {"caption_prefix": "<", "caption_suffix": ">"}
    assert vary(raw, **framed) == "< first, line >"
    assert vary(raw, enable_wildcard=True, seed=1, **framed).startswith("< ")


def test_wildcards() -> None:
    seen = {replace_wildcards("{red|blue} {cat}", random.Random(seed)) for seed in range(20)}
    assert seen == {"red cat", "blue cat"}
    assert replace_wildcards("{{kept}}", random.Random(0)) == "{kept}"
    assert replace_wildcards("open { and } shut", random.Random(0)) == "open  and  shut"
    assert vary("{a|b}") == "{a|b}"


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(st.characters(exclude_characters="{}\x01\x02")), st.integers())
def test_text_without_braces_has_no_wildcards(text: str, seed: int) -> None:
    assert replace_wildcards(text, random.Random(seed)) == text


def test_caption_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffcafé, tag \r\n second line \n".encode())
    assert read_caption(str(tmp_path / "a.txt")) == "café, tag\nsecond line"
    (tmp_path / "blank.txt").write_text("\n")
    assert read_caption(str(tmp_path / "blank.txt")) == ""
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt.*not UTF-8 text \(byte 4\)"):
        read_caption(str(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt.*is empty"):
        read_caption(str(tmp_path / "empty.txt"))


def test_the_caption_file_of_a_face_picture_may_have_the_short_name(tmp_path: Path) -> None:
    face = str(tmp_path / "ann_10_20_30_40.png")
    assert caption_path(face, ".txt") is None
    (tmp_path / "ann.txt").write_text("ann")
    assert caption_path(face, ".txt") == str(tmp_path / "ann.txt")
    (tmp_path / "ann_10_20_30_40.txt").write_text("ann")
    assert caption_path(face, ".txt") == str(tmp_path / "ann_10_20_30_40.txt")
