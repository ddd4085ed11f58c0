"""What a path is said to be before anything is loaded."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.training.model_files import (
    check_model_path,
    is_hub_id,
    kind_of_file,
    kind_of_folder,
    read_safetensors_header,
)
from library.training.options import Options


def write_header(path: Path, shapes: dict[str, list[int]], data: int | None = None) -> Path:
    """A safetensors file of float16 tensors; `data` bytes of them, all where None."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end if data is None else data))
    return path


UNET = {"model.diffusion_model.input_blocks.0.0.weight": [8, 4, 3, 3]}
SD1 = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": [8]}
SD1_EARLY = {"cond_stage_model.transformer.final_layer_norm.weight": [8]}
SD2 = {"cond_stage_model.model.ln_final.weight": [8]}
SDXL = {
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": [8],
    "conditioner.embedders.1.model.ln_final.weight": [8],
}
REFINER = {"conditioner.embedders.0.model.ln_final.weight": [8]}


@pytest.mark.parametrize(
    ("text", "kind"), [(SD1, "sd1"), (SD1_EARLY, "sd1"), (SD2, "sd2"), (SDXL, "sdxl")]
)
def test_kind_from_a_file_header(tmp_path: Path, text: dict[str, list[int]], kind: str) -> None:
    assert kind_of_file(write_header(tmp_path / "m.safetensors", UNET | text)) == kind


def test_kind_from_a_folder(tiny_sd1: Path, tiny_sd2: Path, tiny_sdxl: Path) -> None:
    assert [kind_of_folder(folder) for folder in (tiny_sd1, tiny_sd2, tiny_sdxl)] == [
        "sd1",
        "sd2",
        "sdxl",
    ]


def problems(path: Path | str, sdxl: bool = False, **options: Any) -> list[str]:
    return check_model_path(Options(pretrained_model_name_or_path=str(path), **options), sdxl)


def test_right_models_have_no_problems(tiny_sd1: Path, tiny_sd2: Path, tiny_sdxl: Path) -> None:
    assert problems(tiny_sd1) == []
    assert problems(tiny_sd2, v2=True) == []
    assert problems(tiny_sdxl, sdxl=True) == []
    assert problems("stabilityai/stable-diffusion-xl-base-1.0", sdxl=True) == []
    assert problems(tiny_sd1, vae=str(tiny_sd1)) == []
    assert problems(tiny_sd1, vae=str(tiny_sd1 / "vae")) == []
    assert problems(tiny_sd1, vae="stabilityai/sd-vae-ft-mse") == []


def test_models_of_another_kind_name_the_script_or_the_flag(
    tiny_sd1: Path, tiny_sd2: Path, tiny_sdxl: Path
) -> None:
    assert "sdxl_train_network.py" in problems(tiny_sdxl)[0]
    assert "train it with train_network.py," in problems(tiny_sd1, sdxl=True)[0]
    assert "train_network.py --v2" in problems(tiny_sd2, sdxl=True)[0]
    assert "add --v2" in problems(tiny_sd2)[0]
    assert "take --v2 away" in problems(tiny_sd1, v2=True)[0]
    assert "take --v2 away" in problems(tiny_sdxl, sdxl=True, v2=True)[0]


def test_missing_paths_are_told_with_what_is_near(tmp_path: Path) -> None:
    write_header(tmp_path / "model_v1.safetensors", UNET | SD1)
    (said,) = problems(tmp_path / "model_v2.safetensors")
    assert "does not exist; is" in said
    assert "model_v1.safetensors meant?" in said
    (said,) = problems(tmp_path / "nowhere" / "model.ckpt")
    assert "nor does the folder" in said
    (said,) = problems(tmp_path / "nowhere" / "model")
    assert "does not exist" in said
    assert "missing" in check_model_path(Options(), sdxl=False)[0]


def test_folders_without_a_model(tmp_path: Path, tiny_sd1: Path) -> None:
    assert "is empty" in problems(tmp_path)[0]
    write_header(tmp_path / "a.safetensors", UNET | SD1)
    assert "no model_index.json" in problems(tmp_path)[0]
    assert "name the file itself" in problems(tmp_path)[0]
    copy = shutil.copytree(tiny_sd1, tmp_path / "copy")
    (copy / "unet" / "config.json").unlink()
    assert "lacks" in problems(copy)[0]
    (copy / "model_index.json").write_text("{")
    assert "no valid JSON" in problems(copy)[0]
    (copy / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": []}')
    assert "FluxPipeline without a UNet" in problems(copy)[0]


def test_files_that_are_no_model(tmp_path: Path) -> None:
    other = tmp_path / "model.gguf"
    other.write_text("x")
    assert ".safetensors" in problems(other)[0]
    text = tmp_path / "page.safetensors"
    text.write_text("<html>not found</html>")
    assert "incomplete" in problems(text)[0]
    text.write_bytes(struct.pack("<Q", 4) + b"{{{{")
    assert "header is unreadable" in problems(text)[0]
    cut = write_header(tmp_path / "cut.safetensors", UNET | SD1, data=100)
    assert "Download it again" in problems(cut)[0]
    adapter = write_header(tmp_path / "a.safetensors", {"lora_unet_x.lora_up.weight": [2, 2]})
    assert "--network_weights" in problems(adapter)[0]
    part = write_header(tmp_path / "u.safetensors", {"down_blocks.0.resnets.0.conv1.bias": [2]})
    assert "one part of a model" in problems(part)[0]
    flux = write_header(tmp_path / "f.safetensors", {"double_blocks.0.img_attn.proj.bias": [2]})
    assert "no Stable Diffusion" in problems(flux)[0]
    bare = write_header(tmp_path / "b.safetensors", UNET)
    assert "no text encoder" in problems(bare)[0]


def test_inpainting_models_and_the_refiner_are_refused(tmp_path: Path, tiny_sd1: Path) -> None:
    nine = {"model.diffusion_model.input_blocks.0.0.weight": [8, 9, 3, 3]}
    file = write_header(tmp_path / "inpainting.safetensors", nine | SD1)
    assert "9 input channels" in problems(file)[0]
    copy = shutil.copytree(tiny_sd1, tmp_path / "copy")
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    assert "9 input channels" in problems(copy)[0]
    refiner = write_header(tmp_path / "refiner.safetensors", UNET | REFINER)
    assert "refiner" in problems(refiner, sdxl=True)[0]


def test_wrong_vae_paths(tmp_path: Path, tiny_sd1: Path) -> None:
    assert "does not exist" in problems(tiny_sd1, vae=str(tmp_path / "vae.pt"))[0]
    assert "no config.json" in problems(tiny_sd1, vae=str(tmp_path))[0]
    (tmp_path / "vae.txt").write_text("x")
    assert "no VAE file" in problems(tiny_sd1, vae=str(tmp_path / "vae.txt"))[0]


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_hub_id("stable-diffusion-v1-5/stable-diffusion-v1-5")
    for path in ("models/sd15", "./a/b", "/a/b", "a/b/c", "sd15", "a/b.safetensors", r"c:\a\b"):
        assert not is_hub_id(path), path


def test_header_gives_names_and_shapes(tmp_path: Path) -> None:
    shapes = {"a": [2, 3], "b": []}
    assert read_safetensors_header(write_header(tmp_path / "x.safetensors", shapes)) == shapes


def test_checking_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from library.training.model_files import check_model_path;"
        "from library.training.options import Options;"
        "print(check_model_path(Options(pretrained_model_name_or_path='nothing.ckpt'), False));"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not exist" in done.stdout
