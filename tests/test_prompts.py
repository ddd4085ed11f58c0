"""Prompt files: stock's syntax in its three forms, and what is wrong with a wrong one."""

import json
import logging

import pytest

from library.training.errors import UserError
from library.training.prompts import Prompt, read_prompts


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_file_with_every_option(tmp_path):
    path = write(
        tmp_path,
        "prompts.txt",
        "# a comment\n"
        "\n"
        "red apple, flat --n blurry, photo --w 130 --h 200 --d 42 --s 25 --l 5.5 --ss euler_a\n"
        "plain prompt\n"
        "UPPER --W 72 --D -1\n",
    )
    assert read_prompts(path) == [
        Prompt("red apple, flat", "blurry, photo", 128, 200, 42, 25, 5.5, "euler_a", 0),
        Prompt("plain prompt", "", 512, 512, None, 30, 7.5, None, 1),
        Prompt("UPPER", width=72, index=2),
    ]


def test_values_are_brought_into_range_like_stocks(tmp_path):
    path = write(tmp_path, "p.txt", "a --w 9 --h 519 --s 5000\nb --s 0 --l 7. --n \nc --w 512,\n")
    first, second, third = read_prompts(path)
    assert (first.width, first.height, first.steps) == (64, 512, 1000)
    assert (second.steps, second.scale, second.negative) == (1, 7.0, "")
    assert third.width == 512


def test_a_prompt_may_begin_like_an_option(tmp_path):
    (prompt,) = read_prompts(write(tmp_path, "p.txt", "w 512 is no width --w 64"))
    assert (prompt.text, prompt.width) == ("w 512 is no width", 64)


def test_toml_subsets_override_the_table(tmp_path):
    path = write(
        tmp_path,
        "p.toml",
        "[prompt]\nwidth = 256\nsample_steps = 20\nnegative_prompt = 'blurry'\n"
        "[[prompt.subset]]\nprompt = 'cat'\nseed = 7\n"
        "[[prompt.subset]]\nprompt = 'dog'\nwidth = 128\nscale = 4\nsample_sampler = 'k_lms'\n",
    )
    assert read_prompts(path) == [
        Prompt("cat", "blurry", 256, 512, 7, 20, 7.5, None, 0),
        Prompt("dog", "blurry", 128, 512, None, 20, 4.0, "k_lms", 1),
    ]


def test_json_mixes_lines_and_objects(tmp_path):
    items = ["cat --d 3 --l 6", {"prompt": "dog", "width": 64, "height": 64, "sample_steps": 5}]
    path = write(tmp_path, "p.json", json.dumps(items))
    assert read_prompts(path) == [
        Prompt("cat", seed=3, scale=6.0),
        Prompt("dog", width=64, height=64, steps=5, index=1),
    ]


def test_byte_order_mark_is_no_part_of_the_prompt(tmp_path):
    (prompt,) = read_prompts(write(tmp_path, "p.txt", "\ufeffcat"))
    assert prompt.text == "cat"


def test_options_of_other_models_are_named_as_without_effect(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        (prompt,) = read_prompts(write(tmp_path, "p.txt", "cat --g 3.5 --cn edges.png --w 64"))
    assert prompt == Prompt("cat", width=64)
    assert "guidance_scale" in caplog.text
    assert "controlnet_image" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "ok\ncat --w wide", r"p\.txt, line 2: '--w' needs a whole number, not 'wide'"),
        ("p.txt", "cat --l x", r"line 1: '--l' needs a number"),
        ("p.txt", "cat --w -5", r"'--w' needs a whole number"),
        ("p.txt", "cat --seed 5", r"line 1: there is no option '--seed'"),
        ("p.txt", "cat --ss eulr", r"no sampler 'eulr'. Did you mean 'euler'\?"),
        ("p.txt", "cat --d 18446744073709551616", r"seed 18446744073709551616 is too large"),
        ("p.txt", "# nothing\n\n", r"holds no prompts"),
        ("p.md", "cat", r"must be a \.txt, \.toml or \.json"),
        ("p.toml", "[prompt]\nwidth = \n", r"p\.toml:2:"),
        ("p.toml", "[promt]\n", r"no \[prompt\] table"),
        ("p.toml", "[prompt.subset]\nprompt='a'\n", r"\[\[prompt\.subset\]\]"),
        ("p.toml", "[[prompt.subset]]\nwidht=64\n", r"prompt 1: .*'widht'.*'width'"),
        ("p.json", "[{]", r"not valid JSON"),
        ("p.json", "{}", r"must hold a list"),
        ("p.json", "[3]", r"prompt 1: a prompt is a text or an object"),
        ("p.json", '[{"width": "64"}]', r"prompt 1: 'width' must be a whole number, not '64'"),
        ("p.json", '[{"prompt": 5}]', r"prompt 1: 'prompt' must be a text"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path, name, text, said):
    with pytest.raises(UserError, match=said):
        read_prompts(write(tmp_path, name, text))


def test_a_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_prompts(tmp_path / "nowhere.txt")
    picture = tmp_path / "picture.txt"
    picture.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(picture)
