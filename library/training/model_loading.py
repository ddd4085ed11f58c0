"""Reading a model's parts: from a diffusers folder, from the hub, or from one file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from library.training.clip_tokenizer import clip_tokenizer
from library.training.errors import UserError
from library.training.model_files import (
    Kind,
    kind_of_folder,
    kind_of_keys,
    read_json,
)

SHIPPED_CONFIGS = Path(__file__).parent / "model_configs"
# A checkpoint's own word that it predicts v or was trained with zero terminal SNR (empty tensors).
V_PREDICTION_MARK = "v_pred"


@dataclass
class Parts:
    """What a model is made of; `configs` is the folder with its `vae/config.json`."""

    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    text_encoders: list[Any]  # CLIPTextModel, in SDXL then CLIPTextModelWithProjection
    tokenizers: list[Any]
    scheduler_config: dict[str, Any]
    configs: Path


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the libraries' progress bars and hints about their own loaders off the console."""
    verbosity = diffusers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True)
class Precision:
    """In which dtype the parts are loaded."""

    weights: torch.dtype
    vae: torch.dtype


def download(model_id: str) -> Path:
    """The folder of a hub model's files; from the cache where they are there already."""
    try:
        return Path(DiffusionPipeline.download(model_id, safety_checker=None))
    except OSError as error:
        raise UserError(_why_not(model_id, error)) from error


def _why_not(model_id: str, error: BaseException) -> str:
    chain = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    what = f"the model {model_id} cannot be had from the Hugging Face hub"
    if any(isinstance(link, GatedRepoError) for link in chain):
        return f"{what}: accept its conditions on its page, then log in with `hf auth login`"
    if any(isinstance(link, RepositoryNotFoundError) for link in chain):
        return f"{what}: there is no such model, or it is private (then: `hf auth login`)"
    return (
        f"{what}: it is not in the cache and the hub cannot be reached. Check the name and the "
        "connection, or give the path of a model on this machine"
    )


def load_folder(folder: Path, kind: Kind, precision: Precision) -> Parts:
    """All parts of the diffusers model in `folder`."""
    index = read_json(folder / "model_index.json")
    suffixes = ("", "_2") if kind == "sdxl" else ("",)
    encoders: list[Any] = []
    tokenizers: list[Any] = []
    try:
        for suffix in suffixes:
            encoder_class = CLIPTextModelWithProjection if suffix else CLIPTextModel
            tokenizer_class = getattr(transformers, index[f"tokenizer{suffix}"][1])
            encoders.append(
                _from_pretrained(encoder_class, folder, f"text_encoder{suffix}", precision.weights)
            )
            tokenizers.append(
                tokenizer_class.from_pretrained(folder, subfolder=f"tokenizer{suffix}")
            )
        return Parts(
            _from_pretrained(UNet2DConditionModel, folder, "unet", precision.weights),
            _from_pretrained(AutoencoderKL, folder, "vae", precision.vae),
            encoders,
            tokenizers,
            read_json(folder / "scheduler" / "scheduler_config.json"),
            folder,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model in {folder} cannot be loaded: {error}") from error


def _from_pretrained(part: Any, folder: Path, subfolder: str, dtype: torch.dtype) -> Any:
    """A part's weights; its half-precision variant where the folder has only that."""
    names = [entry.name for entry in (folder / subfolder).glob("*model*.*")]
    half_only = bool(names) and all(".fp16." in name or name.endswith(".json") for name in names)
    variant = "fp16" if half_only else None
    return part.from_pretrained(folder, subfolder=subfolder, torch_dtype=dtype, variant=variant)


def configs_for(path: Path, kind: Kind) -> Path:
    """The folder that describes the architecture of a single-file model.

    That is a diffusers folder of the file's own name or the folder the file is in, where there is
    one of the same kind, and else the published architecture.
    """
    for folder in (path.with_suffix(""), path.parent):
        if (folder / "model_index.json").is_file() and kind_of_folder(folder) == kind:
            return folder
    return SHIPPED_CONFIGS / kind


def load_file(path: Path, map_file: bool, precision: Precision) -> tuple[Parts, Kind]:
    """All parts of a model in the original layout, and its kind."""
    checkpoint = read_checkpoint(path, map_file)
    kind = kind_of_keys({name: tensor.shape for name, tensor in checkpoint.items()}, path)
    configs = configs_for(path, kind)
    try:
        parts = Parts(
            _from_checkpoint(UNet2DConditionModel, checkpoint, configs, "unet", precision.weights),
            _from_checkpoint(AutoencoderKL, checkpoint, configs, "vae", precision.vae),
            _clip_models(checkpoint, kind, configs, precision.weights),
            _tokenizers(kind, configs),
            read_json(configs / "scheduler" / "scheduler_config.json"),
            configs,
        )
    except NotImplementedError as error:  # weights left on the meta device cannot be cast
        raise UserError(f"{path} lacks some of the model's weights") from error
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{path} does not hold the model that {configs} describes: {error}"
        ) from error
    if V_PREDICTION_MARK in checkpoint:
        parts.scheduler_config["prediction_type"] = "v_prediction"
    return parts, kind


def read_checkpoint(path: Path, map_file: bool = True) -> dict[str, Tensor]:
    """The tensors of a model file by name, on the CPU."""
    if path.suffix != ".safetensors":
        content = _read_pickle(path)
    elif map_file:
        content = safetensors_torch.load_file(path)
    else:
        content = safetensors_torch.load(path.read_bytes())
    return {_with_text_model(name): tensor for name, tensor in content.items()}


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). If it is a checkpoint with more than tensors in it, "
            "convert it to .safetensors"
        ) from error
    content = content.get("state_dict", content)
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _with_text_model(name: str) -> str:
    """Early SD 1.x files name CLIP's tensors without the `text_model` level."""
    prefix = "cond_stage_model.transformer."
    if name.startswith(prefix) and not name.startswith(prefix + "text_model."):
        return f"{prefix}text_model.{name.removeprefix(prefix)}"
    return name


def load_vae(name: str, configs: Path, dtype: torch.dtype) -> Any:
    """The VAE that `--vae` names; a single file has the architecture that `configs` describes."""
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return _from_checkpoint(AutoencoderKL, read_checkpoint(path), configs, "vae", dtype)
        if path.is_dir():
            subfolder = None if (path / "config.json").is_file() else "vae"
            return AutoencoderKL.from_pretrained(path, subfolder=subfolder, torch_dtype=dtype)
        return _vae_from_hub(name, dtype)
    except NotImplementedError as error:  # as in load_file
        raise UserError(f"--vae: {name} lacks some of the VAE's weights") from error
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"--vae: {name} cannot be loaded: {error}") from error


def _vae_from_hub(name: str, dtype: torch.dtype) -> Any:
    """A VAE repository, or the `vae` folder of a whole model's."""
    try:
        return AutoencoderKL.from_pretrained(name, torch_dtype=dtype)
    except OSError:
        return AutoencoderKL.from_pretrained(name, subfolder="vae", torch_dtype=dtype)


def _from_checkpoint(
    part: Any, checkpoint: dict[str, Tensor], configs: Path, subfolder: str, dtype: torch.dtype
) -> Any:
    return part.from_single_file(
        checkpoint,
        config=str(configs),
        subfolder=subfolder,
        torch_dtype=dtype,
        local_files_only=True,
    )


def _clip_models(
    checkpoint: dict[str, Tensor], kind: Kind, configs: Path, dtype: torch.dtype
) -> list[Any]:
    classes: dict[str, type] = {"text_encoder": CLIPTextModel}
    if kind == "sdxl":
        classes["text_encoder_2"] = CLIPTextModelWithProjection
    return [
        create_diffusers_clip_model_from_ldm(
            encoder_class,
            checkpoint,
            subfolder=subfolder,
            config=str(configs),
            torch_dtype=dtype,
            local_files_only=True,
        )
        for subfolder, encoder_class in classes.items()
    ]


def _tokenizers(kind: Kind, configs: Path) -> list[Any]:
    names = ("tokenizer", "tokenizer_2") if kind == "sdxl" else ("tokenizer",)
    if (configs / "tokenizer").is_dir():
        return [
            transformers.CLIPTokenizer.from_pretrained(configs, subfolder=name) for name in names
        ]
    padded_with_end = {"sd1": (True,), "sd2": (False,), "sdxl": (True, False)}[kind]
    return [clip_tokenizer() if padded else clip_tokenizer("!") for padded in padded_with_end]
