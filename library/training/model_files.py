"""Which model a path names, found out from names, JSON and file headers. No weights, no torch.

sd1    Stable Diffusion 1.x: CLIP ViT-L, written by its key names `cond_stage_model.transformer.`
sd2    Stable Diffusion 2.x: OpenCLIP ViT-H; linear projections in the UNet's attention
sdxl   Stable Diffusion XL: two text encoders; picture sizes are conditioned on
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from library.optim.spelling import closest
from library.training.errors import UserError
from library.training.options import Options

Kind = Literal["sd1", "sd2", "sdxl"]
KIND_NAMES: dict[Kind, str] = {
    "sd1": "a Stable Diffusion 1.x model",
    "sd2": "a Stable Diffusion 2.x model",
    "sdxl": "an SDXL model",
}
PICKLES = (".ckpt", ".pt", ".pth")
FILE_SUFFIXES = (".safetensors", *PICKLES)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNET = "model.diffusion_model."


@dataclass(frozen=True)
class ModelSource:
    """Where the base model is, and what it is where that can be told without loading it."""

    form: Literal["folder", "file", "hub"]
    name: str
    kind: Kind | None

    @property
    def path(self) -> Path:
        return Path(self.name)


def find_model(options: Options) -> ModelSource:
    """What `--pretrained_model_name_or_path` names. UserError where that is nothing to train on."""
    name = options.pretrained_model_name_or_path
    if not name:
        raise UserError("--pretrained_model_name_or_path is missing: which base model to train on")
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSource("folder", str(path), kind_of_folder(path))
    if path.is_file():
        return ModelSource("file", str(path), kind_of_file(path))
    if is_hub_id(name):
        return ModelSource("hub", name, None)
    raise UserError(f"--pretrained_model_name_or_path: {_missing(path)}")


def check_model_path(options: Options, sdxl: bool) -> list[str]:
    """What is wrong with the base model and the VAE as far as their files tell, without loading."""
    problems = []
    try:
        source = find_model(options)
        if source.kind is not None:
            check_kind(source, source.kind, sdxl, options.v2)
    except UserError as error:
        problems.append(str(error))
    if options.vae:
        problems.extend(_check_vae(Path(options.vae).expanduser(), options.vae))
    return problems


def check_kind(source: ModelSource, kind: Kind, sdxl: bool, v2: bool) -> None:
    """UserError where the model isn't the kind that the script and `--v2` are for."""
    what = f"{source.name} is {KIND_NAMES[kind]}"
    if kind == "sdxl" and not sdxl:
        raise UserError(f"{what}: train it with sdxl_train_network.py")
    if kind != "sdxl" and sdxl:
        script = "train_network.py --v2" if kind == "sd2" else "train_network.py"
        raise UserError(f"{what}: train it with {script}, sdxl_train_network.py is for SDXL")
    if v2 and kind != "sd2":
        raise UserError(f"{what}: take --v2 away, it is for Stable Diffusion 2.x")
    if kind == "sd2" and not v2:
        raise UserError(f"{what}: add --v2 (and --v_parameterization if it predicts v)")


def is_hub_id(name: str) -> bool:
    """Whether `name` can be `owner/model` on the Hugging Face hub, not a path to nothing."""
    if not _HUB_ID.fullmatch(name) or name.endswith(FILE_SUFFIXES):
        return False
    return not Path(name).parent.exists()


def kind_of_folder(folder: Path) -> Kind:
    """The kind of the diffusers model in `folder`."""
    if not any(folder.iterdir()):
        raise UserError(f"the model folder {folder} is empty")
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"{folder} holds no diffusers model (no model_index.json in it).{_files_in(folder)}"
        )
    pipeline = read_json(index)
    if "unet" not in pipeline:
        raise UserError(
            f"{folder} holds a {pipeline.get('_class_name', 'pipeline')} without a UNet. "
            "Stable Diffusion 1.x, 2.x and SDXL can be trained"
        )
    unet = read_json(folder / "unet" / "config.json")
    latent_channels = read_json(folder / "vae" / "config.json").get("latent_channels", 4)
    check_channels(unet.get("in_channels", 4), latent_channels, str(folder))
    if unet.get("addition_embed_type") == "text_time":
        if not (pipeline.get("text_encoder") or [None])[0]:
            raise UserError(f"{folder} is the SDXL refiner; train on the SDXL base model")
        return "sdxl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def kind_of_file(path: Path) -> Kind | None:
    """The kind of the single-file model; None for a pickle, which tells only once it is loaded."""
    if path.suffix not in FILE_SUFFIXES:
        raise UserError(
            f"{path} is no model file: {', '.join(FILE_SUFFIXES)} or a diffusers folder is needed"
        )
    if path.suffix != ".safetensors":
        return None
    return kind_of_keys(read_safetensors_header(path), path)


def kind_of_keys(shapes: Mapping[str, Sequence[int]], path: Path) -> Kind:
    """The kind of a checkpoint in the original layout, from its tensors' names and shapes."""
    prefixes = {".".join(key.split(".")[:3]) + "." for key in shapes}
    if f"{_UNET}input_blocks." not in prefixes:
        raise UserError(f"{path} {_what_else(shapes)}")
    check_channels(shapes[f"{_UNET}input_blocks.0.0.weight"][1], 4, str(path))
    if "conditioner.embedders.1." in prefixes:
        return "sdxl"
    if "conditioner.embedders.0." in prefixes:
        raise UserError(f"{path} is the SDXL refiner; train on the SDXL base model")
    if any(prefix.startswith("cond_stage_model.model.") for prefix in prefixes):
        return "sd2"
    if any(prefix.startswith("cond_stage_model.transformer.") for prefix in prefixes):
        return "sd1"
    raise UserError(f"{path} holds a UNet but no text encoder; a whole model is needed")


def check_channels(in_channels: int, latent_channels: int, name: str) -> None:
    """UserError for models that need more than a noisy latent as input."""
    if in_channels != latent_channels:
        raise UserError(
            f"{name} takes {in_channels} input channels: inpainting and editing models cannot be "
            "trained on captioned pictures alone, take the model they were made from"
        )


def read_safetensors_header(path: Path) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file's tensors. UserError where the file is cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise UserError(f"{path} is no safetensors file or its download is incomplete")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path} is no safetensors file: its header is unreadable") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise UserError(
            f"{path} is incomplete: {size} bytes instead of {8 + length + end}. Download it again"
        )
    return {name: entry["shape"] for name, entry in header.items()}


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"the model lacks {path}")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}") from error
    return content


def _check_vae(path: Path, name: str) -> list[str]:
    if path.is_dir():
        if (path / "config.json").is_file() or (path / "vae" / "config.json").is_file():
            return []
        return [f"--vae: {path} holds no diffusers VAE (no config.json in it or in its vae folder)"]
    if path.is_file():
        if path.suffix not in (*FILE_SUFFIXES, ".bin"):
            return [f"--vae: {path} is no VAE file ({', '.join(FILE_SUFFIXES)})"]
        return []
    return [] if is_hub_id(name) else [f"--vae: {_missing(path)}"]


def _missing(path: Path) -> str:
    """Say that `path` doesn't exist, and what there is like it."""
    folder = path.parent
    if not folder.is_dir():
        return f"{path} does not exist (nor does the folder {folder})"
    found = closest(path.name, (entry.name for entry in folder.iterdir()))
    hint = "" if found is None else f"; is {folder / found} meant?"
    return f"{path} does not exist{hint}"


def _files_in(folder: Path) -> str:
    """A hint for a folder of single-file models."""
    files = sorted(entry.name for entry in folder.iterdir() if entry.suffix in FILE_SUFFIXES)
    return f" To train on {files[0]} name the file itself" if files else ""


def _what_else(shapes: Mapping[str, Sequence[int]]) -> str:
    """What a file without a Stable Diffusion UNet in the original layout seems to be."""
    names = list(shapes)
    if any(name.startswith(("lora_", "lycoris_")) or ".lora_" in name for name in names):
        return "is an adapter, not a base model. Start from it with --network_weights"
    if any(name.startswith(("down_blocks.", "text_model.", "encoder.")) for name in names):
        return "is one part of a model; name the model's folder instead"
    return "is no Stable Diffusion 1.x, 2.x or SDXL model"
