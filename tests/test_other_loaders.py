"""Other programs load our files and draw the pictures that our sampler drew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
from PIL import Image
from runs import model, train, write_dataset
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

PROMPT = "red cat, ink style"


def trained(tmp_path: Path, **options: object) -> tuple[Path, np.ndarray]:
    """A short run that learns fast: its adapter file and its picture of PROMPT, in [0, 1]."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT} --w 64 --h 64 --s 5 --l 4 --d 7 --ss euler\n")
    train(
        dataset_config=write_dataset(tmp_path / "data"),
        output_dir=tmp_path,
        learning_rate=2e-2,
        max_train_steps=6,
        sample_prompts=prompts,
        sample_every_n_steps=6,
        **options,
    )
    (picture,) = (tmp_path / "sample").glob("short_000006_*.png")
    return tmp_path / "short.safetensors", pixels(Image.open(picture))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(
        model(), safety_checker=None, torch_dtype=torch.float32, local_files_only=True
    )
    loaded.scheduler = EulerDiscreteScheduler.from_config(loaded.scheduler.config)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def drawn(loaded: StableDiffusionPipeline) -> np.ndarray:
    """The prompt with the settings of `trained`, by a plain call of diffusers."""
    image = loaded(
        PROMPT,
        negative_prompt="",
        width=64,
        height=64,
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    return pixels(image)


def test_diffusers_loads_a_lora(tmp_path: Path) -> None:
    file, ours = trained(tmp_path)
    keys = load_file(file).keys()
    assert any(key.startswith("lora_te_") for key in keys)
    loaded = pipeline()
    without = drawn(loaded)
    loaded.load_lora_weights(tmp_path, weight_name=file.name)
    theirs = drawn(loaded)
    assert np.abs(theirs - ours).mean() < 1e-3
    assert np.abs(without - ours).mean() > 1e-2  # the adapter does change the picture


@pytest.mark.parametrize("extra", [["factor=4"], ["factor=4", "decompose_both=True"]])
def test_lycoris_loads_a_lokr(tmp_path: Path, extra: list[str]) -> None:
    file, ours = trained(
        tmp_path, network_module="networks.lokr", network_dim=2, network_args=extra
    )
    loaded = pipeline()
    without = drawn(loaded)
    # Its loader first makes a network of its own, which stops at diffusers' UNet by default.
    LycorisNetworkKohya.apply_preset({"unet_target_name": [], "unet_target_module": []})
    # And it reads modules by the names that stock gave them, which transformers 5 shortened.
    weights = {
        key.replace("lora_te_text_model_", "lora_te_"): value
        for key, value in load_file(file).items()
    }
    network, _ = create_network_from_weights(
        1.0, str(file), loaded.vae, loaded.text_encoder, loaded.unet, weights_sd=weights
    )
    network.apply_to(loaded.text_encoder, loaded.unet, True, True)
    network.eval()
    theirs = drawn(loaded)
    assert np.abs(theirs - ours).mean() < 1e-3
    assert np.abs(without - ours).mean() > 1e-2
