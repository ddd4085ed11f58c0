"""Models from configuration files such as `configs/clip_lora.yaml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from library.optim.arguments import check_keys, check_values, flag
from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from utils.packages import missing_package

if TYPE_CHECKING:
    from lora.clip_wrapper import CLIPLoRAWrapper
    from models.clip import FederatedCLIPModel

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("model", "lora", "federated")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
TYPES = ("clip", "clip_lora")
MODEL_KEYS = ["type", "model_name", "num_classes", "normalize_features", "freeze_vision_encoder"]
WRAPPER_KEYS = ["enabled", "target_components"]  # of the section lora, beside LoRAConfig's


def load_config(path: str | Path) -> SimpleNamespace:
    """A YAML file's sections as attributes: `config.model.type`, `config.lora.r`; see
    `read_sections`."""
    sections = read_sections(path)
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in sections.items()})


def read_sections(path: str | Path) -> dict[str, dict[str, Any]]:
    """A YAML file's sections, by name. Numbers such as 3e-3 are numbers, as in YAML 1.2.

    Raises:
        UserError: no such file, it is no YAML with sections, or one's name is nearly that of ours.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no configuration {path}; configs/clip_lora.yaml is an example.")

    class Loader(yaml.SafeLoader):
        """With a rule of its own."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
        raise UserError(f"{path} has to consist of sections: {', '.join(SECTIONS)}.")
    for name in [*found, *(key for part in found.values() for key in part)]:
        if not isinstance(name, str):
            raise UserError(f"{path}: {name!r} is no name; put it in quotes if it is meant to be.")
    for name in found:
        if name not in SECTIONS and (meant := did_you_mean(name, SECTIONS)):
            raise UserError(f"{path}: there is no section '{name}'.{meant}")
    return found


def create_model(config: Any) -> FederatedCLIPModel | CLIPLoRAWrapper:
    """The model that a configuration describes.

    The section `model` has a `type`, `clip` or `clip_lora`, and the arguments of
    `FederatedCLIPModel`; the section `lora` those of `LoRAConfig`, `target_components`, and
    `enabled`, which if false leaves LoRA out. Other sections are left to others. A `model_name`
    that is a folder of this repository may be relative to its root.

    Args:
        config: a path to YAML, a mapping, or an object with the sections as attributes.

    Returns:
        the host, or a wrapper with LoRA applied.

    Raises:
        UserError: no section `model`, an unknown type, or a model that cannot be loaded.
        ValueError: an unknown key or an impossible value; says which is nearest or allowed.
    """
    if isinstance(config, str | Path):
        config = load_config(config)
    sections = _mapping(config)
    if sections.get("model") is None:
        raise UserError("The configuration has no section 'model'.")
    model = _mapping(sections["model"])
    lora = _mapping(sections.get("lora") or {})
    kind = model.get("type")
    if kind not in TYPES:
        raise UserError(
            f"model: there is no type {kind!r}.{did_you_mean(str(kind), TYPES)} "
            f"There are: {', '.join(TYPES)}."
        )
    check_keys(MODEL_KEYS, model, "model")
    _check(model, lora)
    host = _host(model)
    if kind == "clip" or not lora.get("enabled", True):
        return host
    from lora import CLIPLoRAWrapper, LoRAConfig

    settings = {key: value for key, value in lora.items() if key not in WRAPPER_KEYS}
    components = lora.get("target_components", ["encoder"])
    wrapper = CLIPLoRAWrapper(host, LoRAConfig(**settings), components)
    wrapper.apply_lora_to_federated_model()
    return wrapper


def _host(model: Mapping[str, Any]) -> FederatedCLIPModel:
    from models.clip import FederatedCLIPModel

    arguments = {key: value for key, value in model.items() if key != "type"}
    name = arguments.get("model_name")
    if isinstance(name, str) and (ROOT / name).is_dir():
        arguments["model_name"] = str(ROOT / name)
    host = FederatedCLIPModel(**arguments)
    host.name_or_path = name or host.name_or_path
    return host


def _check(model: Mapping[str, Any], lora: Mapping[str, Any]) -> None:
    """Before weights are loaded, which may take long."""
    from lora.config import RULES, LoRAConfig, components_of
    from models.clip import check_model_arguments

    check_model_arguments(model, "model")
    components_of(lora.get("target_components", ["encoder"]))
    check_keys([one.name for one in fields(LoRAConfig)] + WRAPPER_KEYS, lora, "lora")
    check_values({**RULES, "enabled": flag()}, lora, "lora")


def _mapping(section: Any) -> Mapping[str, Any]:
    """
    Raises:
        UserError: it is neither a mapping nor has attributes.
    """
    if isinstance(section, Mapping):
        return section
    if hasattr(section, "__dict__"):
        return vars(section)
    raise UserError(f"The configuration has {section!r} where names and values should be.")
