"""Loading models from folders, single files and the hub's cache; encoding and predicting."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from original_layout import original_tensors, save_original, vae_tensors
from safetensors.torch import load_file, save_file
from tiny_models import Kind, build_pipeline, build_vae
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.training.errors import UserError
from library.training.model_loading import SHIPPED_CONFIGS
from library.training.models import DiffusionModel, load_model
from library.training.options import Options
from library.training.randomness import torch_stream
from library.training.text import encode_captions

KINDS: list[Kind] = ["sd1", "sd2", "sdxl"]


def load(
    path: Path | str, kind: Kind, dtype: torch.dtype = torch.float32, **options: Any
) -> DiffusionModel:
    flags = {"v2": kind == "sd2", "v_parameterization": kind == "sd2"} | options
    chosen = Options(pretrained_model_name_or_path=str(path), **flags)
    return load_model(chosen, kind == "sdxl", dtype, "cpu")


@pytest.fixture(scope="module")
def folders(tiny_sd1: Path, tiny_sd2: Path, tiny_sdxl: Path) -> dict[Kind, Path]:
    return {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}


@pytest.fixture(scope="module")
def models(folders: dict[Kind, Path]) -> dict[Kind, DiffusionModel]:
    return {kind: load(folder, kind) for kind, folder in folders.items()}


def weights(model: DiffusionModel) -> dict[str, Tensor]:
    parts: dict[str, nn.Module] = {"unet": model.unet, "vae": model.vae}
    parts |= {f"text{index}": part for index, part in enumerate(model.text_encoders)}
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def same_weights(one: DiffusionModel, other: DiffusionModel) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_frozen(models: dict[Kind, DiffusionModel], kind: Kind) -> None:
    model = models[kind]
    assert model.kind == kind
    assert model.prediction_type == ("v_prediction" if kind == "sd2" else "epsilon")
    assert model.scheduler_config["prediction_type"] == model.prediction_type
    assert model.vae_factor == 8
    assert len(model.text_encoders) == len(model.tokenizers) == (2 if kind == "sdxl" else 1)
    for part in (model.unet, model.vae, *model.text_encoders):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_holds_the_same_model(
    models: dict[Kind, DiffusionModel],
    folders: dict[Kind, Path],
    kind: Kind,
    suffix: str,
    tmp_path: Path,
) -> None:
    """With its architecture in a folder of the same name; the file's own weights count."""
    no_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folders[kind], tmp_path / "model", ignore=no_weights)
    path = save_original(models[kind].pipeline(), tmp_path / f"model{suffix}")
    for mapped in (True, False):
        model = load(path, kind, disable_mmap_load_safetensors=not mapped)
        assert same_weights(model, models[kind])
        assert model.kind == kind


def test_a_single_file_beside_a_model_index(
    models: dict[Kind, DiffusionModel], folders: dict[Kind, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["sd1"], tmp_path / "any name")
    path = save_original(models["sd1"].pipeline(), folder / "all in one.safetensors")
    assert same_weights(load(path, "sd1"), models["sd1"])


def test_early_files_name_clip_without_text_model(
    models: dict[Kind, DiffusionModel], folders: dict[Kind, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["sd1"], tmp_path / "model")
    tensors = {
        name.replace("transformer.text_model.", "transformer."): tensor.contiguous()
        for name, tensor in original_tensors(models["sd1"].pipeline()).items()
    }
    save_file(tensors, folder.with_suffix(".safetensors"))
    assert same_weights(load(folder.with_suffix(".safetensors"), "sd1"), models["sd1"])


def test_a_file_that_lacks_weights_or_does_not_fit(
    models: dict[Kind, DiffusionModel], folders: dict[Kind, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["sd1"], tmp_path / "model")
    path = save_original(models["sd1"].pipeline(), tmp_path / "model.safetensors")
    tensors = load_file(path)
    del tensors["first_stage_model.decoder.conv_out.bias"]
    save_file(tensors, path)
    with pytest.raises(UserError, match="lacks some of the model's weights"):
        load(path, "sd1")
    shutil.rmtree(folder)  # now the published architecture is taken, which is not this one
    with pytest.raises(UserError, match="does not hold the model"):
        load(path, "sd1")


def test_a_pickle_of_the_wrong_kind_or_with_code_in_it(
    models: dict[Kind, DiffusionModel], folders: dict[Kind, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["sd2"], tmp_path / "model")
    path = save_original(models["sd2"].pipeline(), tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="add --v2"):
        load(path, "sd1")
    torch.save({"state_dict": {}, "callbacks": Surprise()}, path)
    with pytest.raises(UserError, match=r"convert it to \.safetensors"):
        load(path, "sd1")


class Surprise:
    """A class of ours in a checkpoint: unpickling it would run code."""


def test_a_file_that_says_it_predicts_v(
    models: dict[Kind, DiffusionModel],
    folders: dict[Kind, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(folders["sdxl"], tmp_path / "model")
    tensors = original_tensors(models["sdxl"].pipeline()) | {"v_pred": torch.tensor([])}
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with caplog.at_level(logging.WARNING):
        assert load(path, "sdxl").prediction_type == "epsilon"
    assert "add --v_parameterization" in caplog.text


def test_prediction_type_is_the_options_and_a_contradiction_is_told(
    folders: dict[Kind, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load(folders["sd2"], "sd2")
        load(folders["sd1"], "sd1")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        model = load(folders["sd1"], "sd1", v_parameterization=True)
    assert model.prediction_type == "v_prediction"
    assert "leave out --v_parameterization" in caplog.text


def test_other_vaes(
    models: dict[Kind, DiffusionModel], folders: dict[Kind, Path], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    other = build_vae(0.5)
    other.save_pretrained(tmp_path / "whole" / "vae")
    other.save_pretrained(tmp_path / "alone")
    state = {name: tensor.contiguous() for name, tensor in other.state_dict().items()}
    save_file(state, tmp_path / "diffusers.safetensors")
    original = {k: v.contiguous() for k, v in vae_tensors(state, 4).items()}
    save_file(original, tmp_path / "original.safetensors")
    torch.save({"state_dict": original}, tmp_path / "original.pt")
    whole = {f"first_stage_model.{name}": tensor for name, tensor in original.items()}
    save_file(whole, tmp_path / "checkpoint.safetensors")
    names = ["whole", "alone", "diffusers.safetensors", "original.safetensors", "original.pt"]
    for name in [*names, "checkpoint.safetensors"]:
        vae = load(folders["sd1"], "sd1", vae=str(tmp_path / name)).vae
        assert all(torch.equal(vae.state_dict()[key], state[key]) for key in state), name
        # A file has no scaling factor of its own: it is the base model's.
        assert vae.config.scaling_factor == (0.18215 if "." in name else 0.5)
    del original["encoder.conv_in.bias"]
    save_file(original, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match="lacks some of the VAE's weights"):
        load(folders["sd1"], "sd1", vae=str(tmp_path / "broken.safetensors"))


def test_precision(folders: dict[Kind, Path]) -> None:
    model = load(folders["sdxl"], "sdxl", torch.bfloat16)
    assert model.unet.dtype == model.vae.dtype == torch.bfloat16
    assert all(encoder.dtype == torch.bfloat16 for encoder in model.text_encoders)
    assert load(folders["sdxl"], "sdxl", torch.bfloat16, no_half_vae=True).vae.dtype == (
        torch.float32
    )


def test_half_precision_variants_are_found(
    models: dict[Kind, DiffusionModel], tmp_path: Path
) -> None:
    models["sd1"].pipeline().save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert same_weights(load(tmp_path, "sd1"), models["sd1"])


def test_a_folder_without_weights(folders: dict[Kind, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["sd1"], tmp_path / "copy")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load(copy, "sd1")


def test_clip_skip_beyond_the_layers(folders: dict[Kind, Path]) -> None:
    load(folders["sd1"], "sd1", clip_skip=3)
    with pytest.raises(UserError, match="has 3 layers"):
        load(folders["sd1"], "sd1", clip_skip=4)
    load(folders["sdxl"], "sdxl", clip_skip=9)


def hub_run(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` with the hub's cache in `cache`, offline."""
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": ""}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_hub_models_come_from_the_cache_or_are_told_missing(
    folders: dict[Kind, Path], tmp_path: Path
) -> None:
    repository = tmp_path / "models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folders["sd1"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = hub_run(
        """
import torch
from library.training.errors import UserError
from library.training.models import load_model
from library.training.options import Options
for name in ("someone/tiny", "someone/tinny"):
    try:
        model = load_model(Options(pretrained_model_name_or_path=name), False, torch.float32, "cpu")
        print(model.kind)
    except UserError as error:
        print(error)
""",
        tmp_path,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == "sd1"
    assert "someone/tinny cannot be had" in lines[1]
    assert "not in the cache" in lines[1]


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_draws_each_picture_from_its_own_stream(
    models: dict[Kind, DiffusionModel], kind: Kind
) -> None:
    model = models[kind]
    images = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode_images(images, [11, 12, 13])
    assert latents.shape == (3, 4, 8, 6)
    assert latents.dtype == torch.float32
    alone = model.encode_images(images[1:2], [12])
    torch.testing.assert_close(latents[1:2], alone)
    assert not torch.allclose(model.encode_images(images[1:2], [14]), alone)
    with torch.no_grad():
        posterior = model.vae.encode(images).latent_dist
    noise = torch.randn(4, 8, 6, generator=torch_stream(12, "vae"))
    scale = 0.13025 if kind == "sdxl" else 0.18215
    expected = (posterior.mean[1] + posterior.std[1] * noise) * scale
    torch.testing.assert_close(latents[1], expected)


def test_pictures_the_vae_cannot_encode_are_an_error(models: dict[Kind, DiffusionModel]) -> None:
    images = torch.zeros(3, 3, 64, 64)
    images[1] = torch.nan
    with pytest.raises(UserError, match=r"picture\(s\) \[1\]"):
        models["sd1"].encode_images(images, [1, 2, 3])


def test_vae_key_changes_with_what_latents_depend_on(folders: dict[Kind, Path]) -> None:
    model = load(folders["sd1"], "sd1")
    assert model.vae_key == load(folders["sd1"], "sd1").vae_key

    def changed(part: str) -> str:
        other = load(folders["sd1"], "sd1")
        with torch.no_grad():
            other.vae.get_submodule(part).weight[0] += 1
        return other.vae_key

    assert changed("encoder.conv_in") != model.vae_key
    assert changed("quant_conv") != model.vae_key
    assert changed("decoder.conv_in") == model.vae_key
    half = load(folders["sd1"], "sd1", torch.bfloat16)
    assert half.vae_key != model.vae_key
    scaled = load(folders["sd1"], "sd1")
    scaled.vae.register_to_config(scaling_factor=0.5)
    assert scaled.vae_key != model.vae_key


# What `predict` reads of a batch.
SIZES: Any = SimpleNamespace(
    original_sizes=torch.tensor([[512, 384], [100, 200]]),
    crop_top_lefts=torch.tensor([[0, 16], [8, 0]]),
    target_sizes=torch.tensor([[64, 48], [64, 48]]),
)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_is_the_unets(models: dict[Kind, DiffusionModel], kind: Kind) -> None:
    model = models[kind]
    noisy = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([10, 900])
    with torch.no_grad():
        text = encode_captions(model, ["a red cat", ""], Options())
        prediction = model.predict(noisy, steps, text, SIZES)
        if kind != "sdxl":
            expected = model.unet(noisy, steps, text.context).sample
        else:
            # diffusers' own order: original size, crop, target size, each (height, width).
            ids = model.pipeline()._get_add_time_ids
            rows = [
                ids(
                    *(tuple(row.tolist()) for row in (original, crop, target)),
                    dtype=torch.float32,
                    text_encoder_projection_dim=48,
                )
                for original, crop, target in zip(
                    SIZES.original_sizes, SIZES.crop_top_lefts, SIZES.target_sizes, strict=True
                )
            ]
            conditions = {"text_embeds": text.pooled, "time_ids": torch.cat(rows)}
            expected = model.unet(noisy, steps, text.context, added_cond_kwargs=conditions).sample
    torch.testing.assert_close(prediction, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_shares_the_modules_and_draws(
    models: dict[Kind, DiffusionModel], kind: Kind
) -> None:
    model = models[kind]
    pipeline = model.pipeline()
    assert pipeline.unet is model.unet
    assert pipeline.vae is model.vae
    assert pipeline.text_encoder is model.text_encoders[0]
    assert pipeline.scheduler.config.prediction_type == model.prediction_type
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(
        "red cat", num_inference_steps=2, height=64, width=64, output_type="pt", generator=generator
    ).images
    assert drawn.shape == (1, 3, 64, 64)
    assert torch.isfinite(drawn).all()


# Parameters of the published models: UNet, VAE, text encoders.
PUBLISHED = {
    "sd1": (859_520_964, 83_653_863, 123_060_480),
    "sd2": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
}


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_configs_are_the_published_architectures(kind: Kind) -> None:
    configs = SHIPPED_CONFIGS / kind
    with torch.device("meta"):
        parts: list[nn.Module] = [
            part.from_config(part.load_config(configs, subfolder=name))
            for part, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
        ]
        for name in ("text_encoder", "text_encoder_2")[: 2 if kind == "sdxl" else 1]:
            encoder = CLIPTextModelWithProjection if name.endswith("2") else CLIPTextModel
            parts.append(encoder(CLIPTextConfig.from_pretrained(configs, subfolder=name)))
    counts = tuple(sum(weight.numel() for weight in part.parameters()) for part in parts)
    assert counts == PUBLISHED[kind]


def test_published_files_load_with_the_shipped_tokenizer(tmp_path: Path) -> None:
    """A file without a folder beside it: the tokenizer and the scheduler are the shipped ones."""
    from library.training.model_loading import _tokenizers, configs_for

    path = tmp_path / "model.safetensors"
    assert configs_for(path, "sdxl") == SHIPPED_CONFIGS / "sdxl"
    first, second = _tokenizers("sdxl", SHIPPED_CONFIGS / "sdxl")
    assert (first.pad_token, second.pad_token) == ("<|endoftext|>", "!")
    assert [tokenizer.pad_token for tokenizer in _tokenizers("sd2", SHIPPED_CONFIGS / "sd2")] == [
        "!"
    ]


def test_tiny_models_are_reproducible(tmp_path: Path) -> None:
    one = build_pipeline("sd1", tmp_path / "a", seed=3).unet.state_dict()
    other = build_pipeline("sd1", tmp_path / "b", seed=3).unet.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
