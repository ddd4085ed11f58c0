"""The Automagic CameAMP optimizers: one chain with its parts switched, by name (spec 1 §5)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

from library.optim.arguments import OptimizerArgumentError, check_keys, check_values
from library.optim.cameamp import CameAMP
from library.optim.cameamp_config import NO_REGULARIZERS, RULES, OptimizerConfig

__all__ = [
    "Automagic_CameAMP",
    "Automagic_CameAMP8bit",
    "Automagic_CameAMP_8bit",
    "Automagic_CameAMP_COptim",
    "Automagic_CameAMP_COptim8bit",
    "Automagic_CameAMP_Improved",
    "Automagic_CameAMP_Improved_8Bit",
]


class Automagic_CameAMP(CameAMP):
    """CAME with adaptive gradient regularization, momentum by phase and a learning rate for each
    element.

    CAME alone is left where every switch but `came` is off.

    Args:
        params: tensors, `(name, tensor)` pairs, or parameter groups. Names are not needed.
        lr: learning rate; groups may set their own, as with `betas`, `eps` and `weight_decay`.
        profile: `balanced`, `memory_optimized` or `quality_optimized`.
        options: any field of `OptimizerConfig`; it documents them. What is given wins over the
            profile, and this over the class's own defaults.

    Raises:
        OptimizerArgumentError: (a ValueError) an unknown or impossible option; says what is
            allowed.
        NonFiniteGradientError: from `step`, naming the tensors; nothing was changed.
    """

    PRESETS: ClassVar[Mapping[str, Any]] = NO_REGULARIZERS
    ALIASES: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _sign(cls)

    def __init__(self, params: Iterable[Any], lr: float = 1e-6, **options: Any) -> None:
        super().__init__(params, self.configured(lr=lr, **options))

    @classmethod
    def configured(cls, **options: Any) -> OptimizerConfig:
        """The config that these arguments make.

        Raises:
            OptimizerArgumentError: names the key, the value, what is allowed and the nearest key.
        """
        check_keys([*RULES, "profile"], options, cls.__name__)
        renamed = {alias: RULES[name] for alias, name in cls.ALIASES.items()}
        check_values(renamed, options, cls.__name__)
        for alias, name in cls.ALIASES.items():
            if alias in options and name in options:
                raise OptimizerArgumentError(
                    f"{cls.__name__}: {alias} and {name} are the same here; give one of them."
                )
        meant = {cls.ALIASES.get(key, key): value for key, value in options.items()}
        return OptimizerConfig.of_profile(presets=cls.PRESETS, **meant)

    @classmethod
    def validate(cls, **options: Any) -> None:
        """Check arguments without building anything.

        Raises:
            OptimizerArgumentError: names the key, the value, what is allowed and the nearest key.
        """
        cls.configured(**options)


def _sign(cls: type[Automagic_CameAMP]) -> None:
    """Let `help` and `inspect` show a class's options, with its own defaults."""
    either, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    shown = [inspect.Parameter("params", either), inspect.Parameter("lr", either, default=1e-6)]
    for one in fields(OptimizerConfig):
        if one.name != "lr":
            meant = cls.ALIASES.get(one.name, one.name)
            default = cls.PRESETS.get(meant, OptimizerConfig.__dataclass_fields__[meant].default)
            shown.append(inspect.Parameter(one.name, keyword, default=default, annotation=one.type))
    shown.append(inspect.Parameter("profile", keyword, default="balanced"))
    cls.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]


_sign(Automagic_CameAMP)


class Automagic_CameAMP8bit(Automagic_CameAMP):
    """`Automagic_CameAMP` with its moments in 8 bits."""

    PRESETS: ClassVar[Mapping[str, Any]] = {**NO_REGULARIZERS, "optim_bits": 8}


class Automagic_CameAMP_COptim(Automagic_CameAMP):
    """`Automagic_CameAMP` with a multiplier on lr from the course of loss and gradients
    (`context.ContextAwareLR`). `edge_threshold` is C-Optim's here.

    The loss reaches it by the closure of `step` or by `update_context(loss=…)` before each step.
    """

    PRESETS: ClassVar[Mapping[str, Any]] = {**NO_REGULARIZERS, "c_optim": True}
    ALIASES: ClassVar[Mapping[str, str]] = {"edge_threshold": "stagnation_threshold"}


class Automagic_CameAMP_COptim8bit(Automagic_CameAMP_COptim):
    """`Automagic_CameAMP_COptim` with its moments in 8 bits."""

    PRESETS: ClassVar[Mapping[str, Any]] = {**NO_REGULARIZERS, "c_optim": True, "optim_bits": 8}


class Automagic_CameAMP_Improved(Automagic_CameAMP):
    """`Automagic_CameAMP` with all regularizers of the gradient."""

    PRESETS: ClassVar[Mapping[str, Any]] = {}


class Automagic_CameAMP_Improved_8Bit(Automagic_CameAMP_Improved):
    """`Automagic_CameAMP_Improved` with its moments in 8 bits."""

    PRESETS: ClassVar[Mapping[str, Any]] = {"optim_bits": 8}


Automagic_CameAMP_8bit = Automagic_CameAMP8bit
