"""Captions to embeddings, against tokens written by hand and plain calls of the encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.training.clip_tokenizer import clip_tokenizer
from library.training.models import DiffusionModel, load_model
from library.training.options import Options
from library.training.prompt_weights import parse_weights
from library.training.text import TextEncoding, encode_captions, encode_prompts, tokenize


def load(path: Path, kind: str) -> DiffusionModel:
    v2 = kind == "sd2"
    options = Options(pretrained_model_name_or_path=str(path), v2=v2, v_parameterization=v2)
    return load_model(options, kind == "sdxl", torch.float32, "cpu")


@pytest.fixture(scope="module")
def sd1(tiny_sd1: Path) -> DiffusionModel:
    return load(tiny_sd1, "sd1")


@pytest.fixture(scope="module")
def sd2(tiny_sd2: Path) -> DiffusionModel:
    return load(tiny_sd2, "sd2")


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> DiffusionModel:
    return load(tiny_sdxl, "sdxl")


def ids(model: DiffusionModel, caption: str, chunks: int, which: int = 0) -> list[list[int]]:
    tokens, _ = tokenize(
        model.tokenizers[which], model.text_encoders[which], [caption], chunks, weighted=False
    )
    assert tokens.shape == (1, chunks, 77)
    return tokens[0].tolist()


def token(model: DiffusionModel, text: str) -> int:
    return int(model.tokenizers[0].convert_tokens_to_ids(text))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_one_chunk_is_what_the_tokenizer_gives(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    for caption in ("", "a red cat", "Red, ICON!", "red " * 75, "red " * 90):
        own = model.tokenizers[0](
            caption, padding="max_length", truncation=True, max_length=77
        ).input_ids
        assert ids(model, caption, 1) == [own]


def test_a_long_caption_is_cut_in_chunks_with_start_and_end(sd1: DiffusionModel) -> None:
    start, end = token(sd1, "<|startoftext|>"), token(sd1, "<|endoftext|>")
    red, cat = token(sd1, "red</w>"), token(sd1, "cat</w>")
    first, second, third = ids(sd1, "red " * 75 + "cat " * 3, 3)
    assert first == [start] + [red] * 75 + [end]
    assert second == [start] + [cat] * 3 + [end] * 73
    assert third == [start] + [end] * 76


def test_padding_that_is_no_end_gets_one_where_a_chunk_needs_it(sd2: DiffusionModel) -> None:
    start, end, pad = token(sd2, "<|startoftext|>"), token(sd2, "<|endoftext|>"), token(sd2, "!")
    red = token(sd2, "red</w>")
    first, second = ids(sd2, "red " * 80, 2)
    assert first == [start] + [red] * 75 + [end]
    assert second == [start] + [red] * 5 + [end] + [pad] * 70
    first, second = ids(sd2, "red", 2)
    assert first == [start, red, end] + [pad] * 74
    assert second == [start, end] + [pad] * 75


def hidden(model: DiffusionModel, tokens: list[list[int]], which: int = 0) -> Any:
    with torch.no_grad():
        return model.text_encoders[which](torch.tensor(tokens), output_hidden_states=True)


def test_chunks_are_joined_between_one_start_and_one_end(sd1: DiffusionModel) -> None:
    caption = "red cat icon " * 40
    states = hidden(sd1, ids(sd1, caption, 3)).last_hidden_state
    expected = torch.cat([states[0, :-1], states[1, 1:-1], states[2, 1:]])
    got = encode_captions(sd1, [caption], Options(max_token_length=225))
    assert got.context.shape == (1, 3 * 75 + 2, 32)
    torch.testing.assert_close(got.context[0], expected)
    assert got.pooled is None


@pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
def test_clip_skip_takes_an_earlier_layer_and_norms_it(
    sd1: DiffusionModel, clip_skip: int | None
) -> None:
    encoder = sd1.text_encoders[0]
    output = hidden(sd1, ids(sd1, "a red cat", 1))
    state = output.hidden_states[-(clip_skip or 1)]
    norm = dict(encoder.named_modules())["final_layer_norm"]
    expected = torch.nn.functional.layer_norm(state, (32,), norm.weight, norm.bias)
    got = encode_captions(sd1, ["a red cat"], Options(clip_skip=clip_skip))
    torch.testing.assert_close(got.context, expected)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_short_prompts_are_what_diffusers_makes_of_them(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    theirs = model.pipeline().encode_prompt("a red cat, icon", **options)
    for ours in (
        encode_captions(model, ["a red cat, icon"], Options()),
        encode_prompts(model, ["a red cat, icon"], Options()),
    ):
        torch.testing.assert_close(ours.context, theirs[0])
        if kind == "sdxl":
            torch.testing.assert_close(ours.pooled, theirs[2])


def test_sdxl_joins_two_encoders_and_pools_the_first_chunk(sdxl: DiffusionModel) -> None:
    captions = ["red cat icon " * 40, ""]
    got = encode_captions(sdxl, captions, Options(max_token_length=150, clip_skip=1))
    assert got.context.shape == (2, 2 * 75 + 2, 32 + 48)
    assert got.pooled is not None
    for row, caption in enumerate(captions):
        sides = []
        for which in (0, 1):
            output = hidden(sdxl, ids(sdxl, caption, 2, which), which)
            states = output.hidden_states[-2]
            sides.append(torch.cat([states[0, :-1], states[1, 1:]]))
        torch.testing.assert_close(got.context[row], torch.cat(sides, dim=1))
        torch.testing.assert_close(got.pooled[row], output.text_embeds[0])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("(red:1.5)[cat]", [("red", 1.5), ("cat", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:2) cat:0.5)", [("a ", 0.5), ("red", 1.0), (" cat", 0.5)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        (r"\(red\) \[x\] c\at", [("(red) [x] cat", 1.0)]),
        ("(open", [("open", 1.1)]),
        ("10:30) a [b", [("10:30) a ", 1.0), ("b", 1 / 1.1)]),
        ("(red:1.2.3)", [("red:1.2.3", 1.1)]),
        ("", [("", 1.0)]),
    ],
)
def test_weight_syntax(caption: str, expected: list[tuple[str, float]]) -> None:
    got = [(stretch.text, pytest.approx(stretch.weight)) for stretch in parse_weights(caption)]
    assert got == expected


def test_weights_multiply_the_embeddings_of_their_tokens(sd1: DiffusionModel) -> None:
    plain = encode_captions(sd1, ["red cat icon"], Options()).context
    weighted = encode_captions(
        sd1, ["red (cat:1.5) [icon]"], Options(weighted_captions=True)
    ).context
    factors = torch.ones(77)
    factors[2], factors[3] = 1.5, 1 / 1.1
    torch.testing.assert_close(weighted, plain * factors.reshape(1, 77, 1))
    literal = encode_captions(sd1, ["red (cat:1.5) [icon]"], Options()).context
    assert not torch.allclose(literal, weighted)


def test_weights_beyond_the_first_chunk(sdxl: DiffusionModel) -> None:
    options = Options(max_token_length=150, weighted_captions=True)
    plain = encode_captions(sdxl, ["red " * 80 + "cat"], options)
    weighted = encode_captions(sdxl, ["red " * 80 + "(cat:0.5)"], options)
    factors = torch.ones(152)
    factors[81] = 0.5
    torch.testing.assert_close(weighted.context, plain.context * factors.reshape(1, 152, 1))
    torch.testing.assert_close(weighted.pooled, plain.pooled)


def test_prompts_share_a_length_and_are_always_weighted(sd1: DiffusionModel) -> None:
    prompts = ["red " * 160, "(cat:1.4) icon", ""]
    got = encode_prompts(sd1, prompts, Options()).context
    assert got.shape == (3, 3 * 75 + 2, 32)
    plain = encode_captions(sd1, ["cat icon"], Options(max_token_length=225)).context[0]
    factors = torch.ones(227, 1)
    factors[1] = 1.4
    torch.testing.assert_close(got[1], plain * factors)
    assert encode_prompts(sd1, ["cat", "red " * 500], Options()).context.shape[1] == 227
    assert encode_prompts(sd1, [""], Options()).context.shape[1] == 77


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_gradients_reach_every_encoder(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    weights: list[Tensor] = [
        encoder.get_submodule(name).weight.requires_grad_(True)
        for encoder in model.text_encoders
        for name in [n for n, _ in encoder.named_modules() if n.endswith("layers.0.mlp.fc1")]
    ]
    options = Options(weighted_captions=True, max_token_length=150)
    text = encode_captions(model, ["a (red) cat"], options)
    gradients = torch.autograd.grad(text.context.square().sum(), weights)
    assert len(gradients) == len(model.text_encoders)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    for weight in weights:
        weight.requires_grad_(False)


def test_cached_embeddings_equal_fresh_ones_and_are_computed_once(sdxl: DiffusionModel) -> None:
    options = Options(cache_text_encoder_outputs=True)
    encoding = TextEncoding(sdxl, options, trains_text_encoder=False)
    fresh = encode_captions(sdxl, ["cat", "red icon"], options)
    encoding.remember(["red icon", "cat", "cat"])
    calls = []
    hook = sdxl.text_encoders[0].register_forward_hook(lambda *_: calls.append(1))
    cached = encoding(["cat", "red icon"])
    assert not calls
    encoding(["a new one", "cat"])
    assert len(calls) == 1
    hook.remove()
    torch.testing.assert_close(cached.context, fresh.context)
    torch.testing.assert_close(cached.pooled, fresh.pooled)
    assert not cached.context.requires_grad


def test_trained_encoders_are_never_cached(sd1: DiffusionModel) -> None:
    options = Options(cache_text_encoder_outputs=True)
    encoder = sd1.text_encoders[0].requires_grad_(True)
    assert TextEncoding(sd1, options, trains_text_encoder=True)(["cat"]).context.requires_grad
    frozen = TextEncoding(sd1, Options(), trains_text_encoder=False)(["cat"])
    assert not frozen.context.requires_grad
    encoder.requires_grad_(False)


def test_shipped_tokenizer_is_clips() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    known = [49406, 320, 1125, 539, 320, 2368, 49407]  # from OpenAI's CLIP
    assert tokenizer("a photo of a cat").input_ids == known
    assert tokenizer("A  Photo of a CAT").input_ids == known
    assert tokenizer.pad_token_id == 49407
    assert tokenizer.model_max_length == 77
    assert clip_tokenizer("!").pad_token_id == 0
    assert tokenizer.decode(tokenizer("red, ünïcode 猫!").input_ids[1:-1]) == "red , ünïcode 猫 !"
