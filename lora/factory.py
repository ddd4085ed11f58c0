"""Ready-made LoRA models; settings and trained adapters kept by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from library.training.files import recover_folder, write_folder_atomically
from lora.base import ADAPTER, PREFIX
from lora.clip_wrapper import HEAD, CLIPLoRAWrapper
from lora.config import LoRAConfig
from models.clip import DEFAULT_MODEL, FederatedCLIPModel
from models.parameters import as_arrays, load_arrays, refuse_nonfinite

PRESETS = {"small": (8, 16), "medium": (16, 32), "large": (32, 64)}  # rank and alpha
WEIGHTS = "adapter_model.safetensors"  # PEFT's name, as is adapter_config.json
INFO = "lora_info.json"

# What a file and a wrapper must have alike, and what to do where they have not.
_REMEDIES = {
    "architecture": "load the base model that the file was trained on",
    "base_weights": "load the base model that the file was trained on",
    "head_weights": "an adapter that leaves the head as it is goes only with that head",
    "dtype": "turn the host into the file's type, as with model.float()",
    "num_classes": "build the host with as many classes",
    "normalize_features": "build the host with the file's normalize_features",
    "r": "make the wrapper with the file's r",
    "lora_alpha": "make the wrapper with the file's lora_alpha",
    "bias": "make the wrapper with the file's bias",
    "targets": "make the wrapper with the file's target_components or target_modules",
}


def quick_clip_lora(
    model_name: str = DEFAULT_MODEL, num_classes: int = 10, lora_r: int = 16
) -> CLIPLoRAWrapper:
    """A CLIP with LoRA on its vision tower, ready to train; lora_alpha is twice the rank.

    Raises:
        UserError: the model cannot be loaded; ValueError: an impossible number.
    """
    config = LoRAConfig.for_clip_model(r=lora_r, lora_alpha=2 * lora_r)
    wrapper = CLIPLoRAWrapper(FederatedCLIPModel(model_name, num_classes), config)
    wrapper.apply_lora_to_federated_model()
    return wrapper


class LoRAConfigManager:
    """Settings by name, in JSON files of a folder that is made when it is first needed."""

    def __init__(self, directory: str | Path = "lora_configs") -> None:
        self.directory = Path(directory)

    @staticmethod
    def preset(name: str) -> LoRAConfig:
        """`small`, `medium` or `large`: rank 8, 16, 32 and twice that as alpha.

        Raises:
            ValueError: another name.
        """
        if name not in PRESETS:
            raise ValueError(
                f"There is no preset '{name}'.{did_you_mean(name, PRESETS)} "
                f"There are: {', '.join(PRESETS)}."
            )
        r, alpha = PRESETS[name]
        return LoRAConfig.for_clip_model(r=r, lora_alpha=alpha)

    def save_config(self, config: LoRAConfig, name: str) -> Path:
        """Keep `config` by that name, in place of an earlier one; returns the file."""
        config.check()
        return config.save(self._file(name))

    def load_config(self, name: str) -> LoRAConfig:
        """
        Raises:
            UserError: none of that name; says which there are.
        """
        file = self._file(name)
        if not file.is_file():
            raise _unknown("configuration", name, self.directory, self.list())
        return LoRAConfig.load(file)

    def list(self) -> Sequence[str]:
        """Names, sorted."""
        return sorted(file.stem for file in self.directory.glob("[!.]*.json"))

    def _file(self, name: str) -> Path:
        return self.directory / f"{_checked(name)}.json"


class LoRAModelManager:
    """Trained adapters by name: each a folder as PEFT writes it, with `lora_info.json` beside."""

    def __init__(self, directory: str | Path = "lora_models") -> None:
        self.directory = Path(directory)

    def save_model(self, wrapper: CLIPLoRAWrapper, name: str) -> Path:
        """Keep the adapter by that name, in place of an earlier one; returns its folder.

        A kill leaves the earlier one whole.

        Raises:
            LoRAError: LoRA is not applied; ValueError: a tensor holds NaN or infinity (nothing is
                written then); UserError: an impossible name, or that of something else.
        """
        folder = self.directory / _checked(name)
        if folder.exists() and not (folder / INFO).is_file():
            raise UserError(f"{folder} is there already and is no LoRA model; take another name.")
        tensors = {
            key: tensor.detach().cpu().contiguous()
            for key, tensor in wrapper.adapter_tensors().items()
        }
        refuse_nonfinite(tensors)
        info = _describe(wrapper)

        def write(into: Path) -> None:
            wrapper.peft_model().peft_config[ADAPTER].save_pretrained(str(into))
            save_file(tensors, into / WEIGHTS, metadata={"format": "pt"})
            (into / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

        return write_folder_atomically(folder, write)

    def load_model(self, name: str, wrapper: CLIPLoRAWrapper) -> CLIPLoRAWrapper:
        """Put the adapter of that name into `wrapper`, which has LoRA applied; returns it.

        Raises:
            UserError: none of that name; made for another base model, rank, alpha, targets or
                number of classes (names each, with both values and what to do); unreadable.
            ValueError: a tensor does not fit or is not finite. The wrapper is as before.
        """
        info, here = self.get_model_info(name), _describe(wrapper)
        problems = [
            f"{key} is {_short(info.get(key))} in the file and {_short(here[key])} in the wrapper: "
            f"{remedy}{_models(info, here) if key.startswith(('arch', 'base')) else ''}"
            for key, remedy in _REMEDIES.items()
            if info.get(key) != here[key]
        ]
        if any(info.get(key) != here[key] for key in ("num_classes", "targets")):
            problems = [one for one in problems if not one.startswith("head_weights")]
        if info.get("dtype") != here["dtype"]:  # bytes differ then, and tell nothing
            problems = [one for one in problems if not one.startswith(("base", "head"))]
        if problems:
            raise UserError(f"The LoRA '{name}' does not fit: {'; '.join(problems)}.", problems)
        file = self.directory / name / WEIGHTS
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}. Save the model anew.") from error
        tensors = wrapper.adapter_tensors()
        if found.keys() != tensors.keys():
            odd = ", ".join(sorted(found.keys() ^ tensors.keys())[:3])
            raise UserError(f"{file} does not hold this adapter's tensors; they differ in {odd}.")
        load_arrays(tensors, as_arrays({key: found[key] for key in tensors}))
        return wrapper

    def get_model_info(self, name: str) -> dict[str, Any]:
        """What `lora_info.json` says: base model, sizes, rank, alpha, targets, counts, date.

        Raises:
            UserError: none of that name, or the file is not readable.
        """
        folder = self._folder(name)
        try:
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / INFO} cannot be read: {error}") from error
        if not isinstance(info, dict):
            raise UserError(f"{folder / INFO} does not hold names and values.")
        return info

    def list(self) -> Sequence[str]:
        """Names, sorted."""
        return sorted(file.parent.name for file in self.directory.glob(f"[!.]*/{INFO}"))

    def delete(self, name: str) -> None:
        """
        Raises:
            UserError: none of that name.
        """
        shutil.rmtree(self._folder(name))

    def _folder(self, name: str) -> Path:
        folder = self.directory / _checked(name)
        if self.directory.is_dir():
            recover_folder(folder)
        if not (folder / INFO).is_file():
            raise _unknown("LoRA model", name, self.directory, self.list())
        return folder


def _describe(wrapper: CLIPLoRAWrapper) -> dict[str, Any]:
    """What `lora_info.json` holds of it."""
    host, config = wrapper.host, wrapper.made_with
    head = f"{PREFIX}{HEAD}.weight"
    trainable, total = wrapper.count_parameters()
    return {
        "base_model": host.name_or_path,
        "base_weights": wrapper.base_digest("clip."),
        "head_weights": None
        if head in wrapper.adapter_tensors()
        else wrapper.base_digest("classifier."),
        "architecture": host.architecture(),
        "dtype": str(next(host.parameters()).dtype).removeprefix("torch."),
        "num_classes": host.num_classes,
        "normalize_features": host.normalize_features,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "bias": config.bias,
        "target_components": None if config.target_modules else list(wrapper.target_components),
        "targets": sorted(wrapper.targets),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _short(value: Any) -> str:
    """A value for a message; of a digest or a long list the beginning."""
    if isinstance(value, list):
        rest = f", … ({len(value)})" if len(value) > 3 else ""
        return f"[{', '.join(map(str, value[:3]))}{rest}]"
    if isinstance(value, str) and len(value) == 64:
        return value[:8]
    return repr(value)


def _models(info: dict[str, Any], here: dict[str, Any]) -> str:
    return f" ({info.get('base_model')!r}; the wrapper has {here['base_model']!r})"


def _checked(name: str) -> str:
    """
    Raises:
        UserError: the name would lead out of the folder, or is hidden or empty.
    """
    if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\\:\0"):
        raise UserError(
            f"{name!r} cannot be a name: it may not be empty, begin with a dot or hold / \\ or :."
        )
    return name


def _unknown(kind: str, name: str, directory: Path, known: Sequence[str]) -> UserError:
    there = f"There are: {', '.join(known)}." if known else "There are none."
    return UserError(f"No {kind} '{name}' in {directory}.{did_you_mean(name, known)} {there}")
