"""What a LoRA is made with: rank, scale, targets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from library.optim.arguments import (
    Rule,
    check_keys,
    check_values,
    flag,
    number,
    one_of,
    plain,
    whole_number,
)
from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from library.training.files import write_atomically
from utils.packages import missing_package

COMPONENTS = ("encoder", "classifier")  # of CLIP; the wrapper says what they are


def _names(value: object) -> bool:
    return value is None or (
        isinstance(value, tuple)
        and len(value) > 0
        and all(isinstance(name, str) and name for name in value)
    )


RULES: dict[str, Rule] = {
    "r": whole_number(1),
    "lora_alpha": number(0, open_low=True),
    "lora_dropout": number(0, 1, open_high=True),
    "target_modules": Rule(_names, "None or a list of names of modules"),
    "bias": one_of("none", "all", "lora_only"),
    "save_only_trainable": flag(),
    "freeze_a": flag(),
    "seed": whole_number(0, 2**63 - 1),  # torch's
}


@dataclass
class LoRAConfig:
    """LoRA's settings: W + (lora_alpha / r) · B A (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    Attributes:
        r: rank, the inner dimension of B A.
        lora_alpha: scale, divided by r.
        lora_dropout: probability with which an input of A is dropped in training.
        target_modules: names of the linear layers that get a LoRA, whole or only their ends
            (`q_proj`), in place of the wrapper's own choice.
        bias: which of the host's own biases are trained beside: `none`, `all`, or those of
            layers with a LoRA (`lora_only`).
        save_only_trainable: only what is trained travels (`get_parameters`); otherwise all does.
        freeze_a: A stays at its first values and does not travel, so that the mean of B A is
            the mean of B times A.
        seed: of A's first values; B begins at zero.

    Raises:
        ValueError: an impossible value; names the field, the value and what is allowed.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    target_modules: list[str] | None = None
    bias: str = "none"
    save_only_trainable: bool = True
    freeze_a: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.check()
        for name, value in vars(self).items():
            setattr(self, name, plain(value))
        if self.target_modules is not None:
            self.target_modules = list(self.target_modules)

    def check(self) -> None:
        """
        Raises:
            ValueError: a field was set to what is not possible.
        """
        check_values(RULES, vars(self), "LoRAConfig")

    @classmethod
    def for_clip_model(cls, r: int = 16, lora_alpha: float = 32, **rest: Any) -> LoRAConfig:
        """For CLIP: the wrapper chooses the layers."""
        return cls.of_dict({"r": r, "lora_alpha": lora_alpha, **rest})

    @classmethod
    def for_classification_head(cls, r: int = 8, lora_alpha: float = 16, **rest: Any) -> LoRAConfig:
        """For the head alone."""
        return cls.of_dict(
            {"r": r, "lora_alpha": lora_alpha, "target_modules": ["classifier"], **rest}
        )

    @classmethod
    def of_dict(cls, values: Mapping[str, Any], owner: str = "LoRAConfig") -> LoRAConfig:
        """From a mapping; what it does not name has its default.

        Raises:
            ValueError: a key that there is not (says which is nearest), or an impossible value.
        """
        check_keys([one.name for one in fields(cls)], values, owner)
        check_values(RULES, values, owner)
        return cls(**values)

    def save(self, path: str | Path) -> Path:
        """Write it to a `.json`, `.yaml` or `.yml` file."""
        path = Path(path)
        if _is_yaml(path):
            text = _yaml().safe_dump(asdict(self), sort_keys=False)
        else:
            text = json.dumps(asdict(self), indent=2) + "\n"

        def write(to: Path) -> None:
            to.write_text(text, encoding="utf-8")

        return write_atomically(path, write)

    @classmethod
    def load(cls, path: str | Path) -> LoRAConfig:
        """Read what `save` wrote, or a file written by hand.

        Raises:
            UserError: no such file, another kind of file, or not readable.
            ValueError: see `of_dict`; names the file.
        """
        path = Path(path)
        as_yaml = _is_yaml(path)
        if not path.is_file():
            raise UserError(f"There is no LoRA configuration {path}.")
        values = _read(path, as_yaml)
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise UserError(f"{path} has to hold names and values, such as r: 16.")
        return cls.of_dict(values, str(path))


def components_of(given: Iterable[str]) -> tuple[str, ...]:
    """Checked, and in an order of their own.

    Raises:
        ValueError: none, or an unknown one.
    """
    if not isinstance(given, str | list | tuple | set):
        raise ValueError(
            f"target_components={given!r} is not possible; it must be a list of some of "
            f"{', '.join(COMPONENTS)}."
        )
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in COMPONENTS:
            raise ValueError(
                f"target_components: there is no component {name!r}."
                f"{did_you_mean(str(name), COMPONENTS)} There are: {', '.join(COMPONENTS)}."
            )
    if not names:
        raise ValueError(f"target_components is empty; there are: {', '.join(COMPONENTS)}.")
    return tuple(component for component in COMPONENTS if component in names)


def _read(path: Path, as_yaml: bool) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: {error}") from error
    if not as_yaml:
        try:
            return json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}") from error
    yaml = _yaml()
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {error}") from error


def _is_yaml(path: Path) -> bool:
    """
    Raises:
        UserError: the file's ending is none of the three.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"{path}: a LoRA configuration ends in .json, .yaml or .yml.")
    return suffix != ".json"


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    return yaml
