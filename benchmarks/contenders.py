"""The optimizers that are compared: where each one's class is, and what it is built with."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter

from library.custom_automagic_cameamp_optimizer import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_Improved,
)
from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW

LR = 1e-4


@dataclass(frozen=True)
class Contender:
    """An optimizer with its arguments; all but these and lr are the optimizer's own defaults.

    Attributes:
        key: how the command line calls it.
        label: how tables and charts call it.
        module, attribute: where the class is.
        package: the distribution that it comes from; None is this project.
    """

    key: str
    label: str
    module: str
    attribute: str
    package: str | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    on_gpu: bool = True

    @property
    def ours(self) -> bool:
        return self.package is None

    @property
    def version(self) -> str:
        return "" if self.package is None else importlib.metadata.version(self.package)

    def obstacle(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if importlib.util.find_spec(self.module.split(".")[0]) is None:
            return "not installed"
        try:
            found = self._class()
        except (ImportError, AttributeError, OSError) as error:
            return f"cannot be imported: {error}"
        accepted = inspect.signature(found).parameters
        if unknown := [name for name in self.arguments if name not in accepted]:
            return f"this version has no argument {', '.join(unknown)}"
        return None

    def build(self, parameters: Mapping[str, Parameter], **more: Any) -> torch.optim.Optimizer:
        """The optimizer for these parameters. Only ours has a use for their names."""
        params = list(parameters.items()) if self.ours else list(parameters.values())
        built: torch.optim.Optimizer = self._class()(params, lr=LR, **self.arguments, **more)
        return built

    def _class(self) -> Any:
        return getattr(importlib.import_module(self.module), self.attribute)


def _ours(cls: type, key: str, label: str, **arguments: Any) -> Contender:
    return Contender(key, label, cls.__module__, cls.__name__, None, arguments)


REFERENCE = Contender(
    "adamw-fused", "torch AdamW, fused", "torch.optim", "AdamW", "torch", {"fused": True}
)

CONTENDERS = (
    REFERENCE,
    Contender(
        "adamw-loop",
        "torch AdamW, for-loop",
        "torch.optim",
        "AdamW",
        "torch",
        {"foreach": False, "fused": False},
        on_gpu=False,
    ),
    Contender(
        "bnb-adamw8bit",
        "bitsandbytes AdamW8bit",
        "bitsandbytes.optim",
        "AdamW8bit",
        "bitsandbytes",
    ),
    Contender(
        "ao-adamw8bit",
        "torchao AdamW8bit",
        "torchao.optim",
        "AdamW8bit",
        "torchao",
        on_gpu=False,
    ),
    Contender("came", "came-pytorch CAME", "came_pytorch", "CAME", "came-pytorch", on_gpu=False),
    *(
        Contender(
            f"po-{name.lower()}",
            f"pytorch_optimizer {name}",
            "pytorch_optimizer",
            name,
            "pytorch_optimizer",
            on_gpu=False,
        )
        for name in ("ADOPT", "Grams", "AdaTAM")
    ),
    _ours(HinaAdamWOptimizer, "hina", "HinaAdamW, all defaults"),
    _ours(
        HinaAdamWOptimizer,
        "hina-adamw",
        "HinaAdamW, only 8-bit AdamW on",
        **dict.fromkeys(HinaAdamWOptimizer.SWITCHES, False),
    ),
    _ours(HinaAdamWOptimizer, "hina-eager", "HinaAdamW, all defaults, eager", backend="eager"),
    _ours(AdaptiveHinaAdamW, "adaptive", "AdaptiveHinaAdamW, all defaults"),
    _ours(AdaptiveHinaAdamW, "adaptive-frozen", "the same, lr_mask frozen", warmup_steps=0),
    _ours(Automagic_CameAMP8bit, "cameamp8", "Automagic_CameAMP8bit, early warm-up"),
    _ours(Automagic_CameAMP8bit, "cameamp8-stable", "the same, behind warm-up", warmup_steps=1),
    _ours(Automagic_CameAMP, "cameamp", "Automagic_CameAMP, early warm-up"),
    _ours(Automagic_CameAMP, "cameamp-stable", "the same, behind warm-up", warmup_steps=1),
    _ours(
        Automagic_CameAMP_Improved,
        "improved",
        "Automagic_CameAMP_Improved, all regularizers",
        warmup_steps=100,
    ),
)

BY_KEY = {contender.key: contender for contender in CONTENDERS}
