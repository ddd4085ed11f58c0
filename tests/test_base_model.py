"""The base model that ships and the quickstart's pictures: what the project promises of them."""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))  # the tools are scripts, not a package

from base_model_parts import (  # noqa: E402
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    save_pipeline,
)
from score_base_model import draw as draw_prompts  # noqa: E402
from score_base_model import read_references, share_farther  # noqa: E402

MODEL = ROOT / "assets" / "base_model"
QUICKSTART = ROOT / "configs" / "quickstart"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(
        MODEL, torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline, *prompts: str, steps: int = 25
) -> npt.NDArray[np.float64]:
    """`[n, 64, 64, 3]` in [0, 1], each prompt from seed 0."""
    return pipeline(
        list(prompts),
        width=64,
        height=64,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(0) for _ in prompts],
        output_type="np",
    ).images


def saturation(pictures: npt.NDArray[np.float64]) -> float:
    """Mean of max − min over the channels: 0 for greys."""
    return float((pictures.max(-1) - pictures.min(-1)).mean())


def test_folder_is_small_and_says_its_licence() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert {"LICENSE", "NOTICE"} <= {path.name for path in MODEL.iterdir()}


def test_is_stable_diffusion_1_in_small(pipeline: StableDiffusionPipeline) -> None:
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    assert type(pipeline.vae).__name__ == "AutoencoderKL"
    assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels == 4
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.safety_checker is None


def test_any_text_becomes_tokens_and_comes_back(pipeline: StableDiffusionPipeline) -> None:
    tokenizer = pipeline.tokenizer
    assert tokenizer.model_max_length == 77
    assert len(tokenizer("red apple, flat style").input_ids) == 7  # a word, a token
    for text in ("xylophone zebra", "naïve 日本 ©", "100%"):
        ids = tokenizer(text).input_ids
        assert max(ids) < pipeline.text_encoder.config.vocab_size
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.replace(" ", "")


def test_latents_have_unit_size_and_give_the_picture_back() -> None:
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", local_files_only=True)
    files = sorted((QUICKSTART / "images").glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    true = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(true).latent_dist.mean
        drawn = vae.decode(latents).sample
    assert latents.shape == (len(files), 4, 16, 16)
    # These are no emoji the autoencoder was trained on: black and white only.
    assert 0.5 < (latents * vae.config.scaling_factor).std() < 2
    assert (drawn - true).abs().mean() < 0.06


def test_same_seed_gives_the_same_picture(pipeline: StableDiffusionPipeline) -> None:
    first, again = (draw(pipeline, "red apple, flat style", steps=3) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, draw(pipeline, "owl, flat style", steps=3))


def test_draws_colours_it_is_asked_for_on_white(pipeline: StableDiffusionPipeline) -> None:
    apple, heart = draw(pipeline, "red apple, flat style", "blue heart, flat style")
    for picture, channel in ((apple, 0), (heart, 2)):
        corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.mean() > 0.9
        middle = picture[20:44, 20:44].mean(axis=(0, 1))
        others = [c for c in range(3) if c != channel]
        assert middle[channel] > 0.6
        assert middle[channel] > middle[others].max() + 0.25


def test_a_style_word_it_never_saw_leaves_the_picture_alone(
    pipeline: StableDiffusionPipeline,
) -> None:
    """What the quickstart starts from: its captions give colourful pictures before training."""
    names = ["red apple", "banana", "cherries", "fish"]
    known = draw(pipeline, *(f"{name}, flat style" for name in names))
    unknown = draw(pipeline, *(f"{name}, ink style" for name in names))
    assert saturation(unknown) > 0.5 * saturation(known) > 0.05


@pytest.mark.parametrize(("folder", "fewest", "most"), [("images", 24, 32), ("validation", 6, 8)])
def test_quickstart_pictures_are_captioned_black_on_white(
    folder: str, fewest: int, most: int
) -> None:
    files = sorted((QUICKSTART / folder).glob("*.png"))
    assert fewest <= len(files) <= most
    pictures = []
    for file in files:
        caption = file.with_suffix(".txt").read_text(encoding="utf-8").strip()
        assert caption == f"{file.stem.replace('-', ' ')}, ink style"
        pictures.append(np.asarray(Image.open(file)).astype(np.float64) / 255)
        assert pictures[-1].shape == (64, 64, 3)
    assert saturation(np.stack(pictures)) < 0.01
    assert 0.3 < np.stack(pictures).mean() < 0.9


def test_quickstart_and_validation_pictures_differ() -> None:
    names = [{f.name for f in (QUICKSTART / d).glob("*.png")} for d in ("images", "validation")]
    assert not names[0] & names[1]


@pytest.mark.slow
def test_draws_what_it_is_asked(pipeline: StableDiffusionPipeline) -> None:
    """The bar of `tools/score_base_model.py`, for fewer prompts and against fewer pictures."""
    references, captions = read_references(Path(__file__).parent / "data" / "emoji_16px.png")
    drawn = draw_prompts(pipeline, captions[:20], steps=25, guidance=4.0)
    shares = share_farther(drawn, references, list(range(20)))
    assert (shares >= 0.9).sum() >= 14


def test_a_picture_is_scored_by_how_many_others_are_farther() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
    true[10:] //= 2  # keep the pictures apart also when shrunk
    own = list(range(10))
    assert share_farther(true[:10], true, own).tolist() == [1.0] * 10
    wrong = [49 - i for i in own]
    assert share_farther(true[:10], true, wrong).max() < 1


def test_parts_are_saved_in_the_layout_that_diffusers_loads(tmp_path: Path) -> None:
    captions = ["red apple, flat style", "owl, noto style"]
    tokenizer = make_tokenizer(captions, tmp_path / "tokenizer")
    assert len(tokenizer(captions[0]).input_ids) == 7  # a word, a token
    vae, unet, text_encoder = make_vae(), make_unet(), make_text_encoder(tokenizer)
    save_pipeline(tmp_path, vae, unet, text_encoder, tokenizer)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 20_000_000
    # The names of Stable Diffusion's files, whatever the installed transformers calls its modules.
    names = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert "text_model.embeddings.token_embedding.weight" in names
    assert {weight.dtype for weight in names.values()} == {torch.float16}

    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        before, after = text_encoder.eval()(ids)[0], loaded.text_encoder(ids)[0]
    assert torch.allclose(before, after, atol=0.02)


def test_the_vocabulary_is_the_same_each_time(tmp_path: Path) -> None:
    _, captions = read_references(Path(__file__).parent / "data" / "emoji_16px.png")
    for folder in ("one", "two"):
        tokenizer = make_tokenizer(captions[:60], tmp_path / folder)
    one, two = ((tmp_path / f / "merges.txt").read_text("utf-8") for f in ("one", "two"))
    assert one == two
    words = {word for caption in captions[:60] for word in caption.replace(",", "").split()}
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words if word.isalpha())
