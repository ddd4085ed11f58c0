"""Names of optimizers: short ones to classes, arguments checked before anything is built.

Nothing here imports an optimizer's package before it is needed. Errors are `ValueError`s whose text
is meant for the person who typed the name or the argument.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .arguments import (
    OptimizerArgumentError,
    Rule,
    check_keys,
    check_values,
    flag,
    number,
    pair,
)
from .engine import ChainOptimizer
from .spelling import did_you_mean

logger = logging.getLogger(__name__)


class UnknownOptimizerError(ValueError):
    """A name that no optimizer has."""


class MissingPackageError(ValueError):
    """The optimizer's package is not installed; the message says how to install it."""


@dataclass(frozen=True)
class OptimizerSpec:
    """What a name stands for.

    Attributes:
        name: the name as it is usually written.
        module, attribute: where the class is.
        package: what `pip install` calls the package, where it differs from the module's name.
        fixed: arguments that the name itself stands for; giving them is an error.
        presets: arguments that the name changes the default of.
    """

    name: str
    module: str
    attribute: str
    package: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Any] = field(default_factory=dict)

    @property
    def adafactor(self) -> bool:
        """Whether it is transformers' Adafactor, which may choose its own step size; torch's class
        of the same name does not."""
        return self.attribute == "Adafactor" and self.module.split(".")[0] == "transformers"

    @property
    def schedule_free(self) -> bool:
        """Whether it replaces the learning-rate schedule and must be told train from eval."""
        return self.attribute.lower().endswith("schedulefree")

    def load(self) -> type[torch.optim.Optimizer]:
        """Import the class.

        Raises:
            MissingPackageError: the package is not installed.
            UnknownOptimizerError: the package has no such class.
        """
        top = self.module.split(".")[0]
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            missing = (error.name or top).split(".")[0]
            if missing != top or error.name == top:
                package = self.package if missing == top and self.package else missing
                raise MissingPackageError(
                    f"Optimizer {self.name} needs the package '{missing}', which is not installed. "
                    f"Install it: pip install {package}"
                ) from error
            raise UnknownOptimizerError(
                f"Optimizer {self.name}: there is no module '{self.module}'."
            ) from error
        found = getattr(module, self.attribute, None)
        if not callable(found):
            raise UnknownOptimizerError(
                f"Optimizer {self.name}: module '{self.module}' has no class '{self.attribute}'."
                f"{did_you_mean(self.attribute, dir(module))}"
            )
        return found


_HINA = "library.custom_hina_adamw_optimizer"
_ADAPTIVE = "library.custom_hina_adaptive_adamw_optimizer"
_CAMEAMP = "library.custom_automagic_cameamp_optimizer"
_REFACTORED = "library.automagic_cameamp_refactored"

_FAMILY = {
    "HinaAdamW": OptimizerSpec("HinaAdamW", _HINA, "HinaAdamWOptimizer"),
    "HinaAdamWOptimizer": OptimizerSpec("HinaAdamW", _HINA, "HinaAdamWOptimizer"),
    "CustomAdamW": OptimizerSpec("HinaAdamW", _HINA, "HinaAdamWOptimizer"),
    "AdaptiveHinaAdamW": OptimizerSpec("AdaptiveHinaAdamW", _ADAPTIVE, "AdaptiveHinaAdamW"),
    **{
        name: OptimizerSpec(name, _CAMEAMP, name)
        for name in (
            "Automagic_CameAMP",
            "Automagic_CameAMP8bit",
            "Automagic_CameAMP_COptim",
            "Automagic_CameAMP_COptim8bit",
            "Automagic_CameAMP_Improved",
            "Automagic_CameAMP_Improved_8Bit",
        )
    },
    "Automagic_CameAMP_8bit": OptimizerSpec(
        "Automagic_CameAMP8bit", _CAMEAMP, "Automagic_CameAMP8bit"
    ),
    "RefactoredAutomagicCameAMP": OptimizerSpec(
        "RefactoredAutomagicCameAMP", _REFACTORED, "RefactoredAutomagicCameAMP"
    ),
}

_NESTEROV: dict[str, Any] = {"fixed": {"nesterov": True}, "presets": {"momentum": 0.9}}
_PREPRINT = "dadaptation.experimental"
_BITSANDBYTES = (
    "AdamW8bit",
    "Lion8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion8bit",
    "AdEMAMix8bit",
    "PagedAdEMAMix8bit",
)
_DADAPTATION = ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD")
_SCHEDULE_FREE = ("RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree")

_STOCK = (
    OptimizerSpec("AdamW", "torch.optim", "AdamW"),
    OptimizerSpec("Lion", "lion_pytorch", "Lion", "lion-pytorch"),
    OptimizerSpec("SGDNesterov", "torch.optim", "SGD", **_NESTEROV),
    OptimizerSpec("SGDNesterov8bit", "bitsandbytes.optim", "SGD8bit", **_NESTEROV),
    *(OptimizerSpec(name, "bitsandbytes.optim", name) for name in _BITSANDBYTES),
    OptimizerSpec("DAdaptation", _PREPRINT, "DAdaptAdamPreprint"),
    OptimizerSpec("DAdaptAdamPreprint", _PREPRINT, "DAdaptAdamPreprint"),
    OptimizerSpec("DAdaptAdanIP", _PREPRINT, "DAdaptAdanIP"),
    *(OptimizerSpec(name, "dadaptation", name) for name in _DADAPTATION),
    OptimizerSpec("Prodigy", "prodigyopt", "Prodigy"),
    OptimizerSpec("AdaFactor", "transformers.optimization", "Adafactor"),
    *(OptimizerSpec(name, "schedulefree", name) for name in _SCHEDULE_FREE),
)


def _torch_optimizers() -> dict[str, OptimizerSpec]:
    classes = {name: item for name, item in vars(torch.optim).items() if inspect.isclass(item)}
    return {
        name: OptimizerSpec(name, "torch.optim", name)
        for name, item in classes.items()
        if issubclass(item, torch.optim.Optimizer) and item is not torch.optim.Optimizer
    }


def _short_names() -> dict[str, tuple[str, OptimizerSpec]]:
    """By lower-case name: the name as it is usually written, and what it stands for.

    Stock's names go before torch's: its AdaFactor is transformers', not torch's Adafactor.
    """
    named = [
        *_FAMILY.items(),
        *((spec.name, spec) for spec in _STOCK),
        *_torch_optimizers().items(),
    ]
    return {name.lower(): (name, spec) for name, spec in reversed(named)}


def known_names() -> list[str]:
    """Every short name, as it is usually written."""
    return sorted((name for name, _ in _short_names().values()), key=str.lower)


def resolve(optimizer_type: str) -> OptimizerSpec:
    """What `--optimizer_type` stands for. Imports nothing but torch.

    A short name in any letter case, a class of `torch.optim`, or `package.module.Class`; an empty
    name is AdamW.

    Raises:
        UnknownOptimizerError: no such short name; says which is nearest.
    """
    wanted = optimizer_type.strip() or "AdamW"
    module, _, attribute = wanted.rpartition(".")
    if module:
        return OptimizerSpec(wanted, module, attribute)
    found = _short_names().get(wanted.lower())
    if found is not None:
        return found[1]
    raise UnknownOptimizerError(
        f"There is no optimizer '{wanted}'.{did_you_mean(wanted, known_names())} "
        f"Known short names: {', '.join(known_names())}. "
        "Any other is given as package.module.Class."
    )


def of_family(optimizer_type: str) -> bool:
    """Whether `--optimizer_type` names one of this project's optimizers: by a short
    name, or by the path of its class or of one derived from it. A path that leads nowhere is
    nobody's, and of other programs' short names nothing needs to be known."""
    wanted = optimizer_type.strip()
    module, _, _ = wanted.rpartition(".")
    if not module:
        return wanted.lower() in map(str.lower, _FAMILY)
    try:
        cls = resolve(wanted).load()
    except (MissingPackageError, UnknownOptimizerError):
        return False
    return isinstance(cls, type) and issubclass(cls, ChainOptimizer)


def parse_optimizer_args(arguments: Iterable[str] | None) -> dict[str, Any]:
    """`--optimizer_args`: `key=value` with a Python literal; a bare word is a string.

    Raises:
        OptimizerArgumentError: no `=`, no key, or a value that is neither.
    """
    values: dict[str, Any] = {}
    for argument in arguments or ():
        key, equals, text = (part.strip() for part in argument.partition("="))
        if not equals or not key.isidentifier():
            raise OptimizerArgumentError(
                f"Optimizer argument '{argument}' is not of the form key=value, "
                "for example weight_decay=0.01."
            )
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            if not re.fullmatch(r"[A-Za-z_][\w./-]*", text):
                raise OptimizerArgumentError(
                    f"The value of optimizer argument '{argument}' is neither a Python literal "
                    "(0.01, True, (0.9,0.99), 'text') nor a bare word."
                ) from error
            values[key] = text
    return values


# What these names mean everywhere, for classes that cannot check their own arguments.
_COMMON_RULES: dict[str, Rule] = {
    "betas": pair(number(0, 1, open_high=True)),
    "eps": number(0),
    "weight_decay": number(0),
    "momentum": number(0),
}


def check_arguments(
    cls: type, kwargs: Mapping[str, Any], fixed: Mapping[str, Any] | None = None
) -> None:
    """Check arguments of an optimizer class without building it.

    The family's classes check themselves (`validate`). Of any other class the signature tells the
    keys and, by the defaults, the kinds of the values; what takes `**kwargs` takes every key.

    Args:
        fixed: arguments that are set already (`OptimizerSpec.fixed`).

    Raises:
        OptimizerArgumentError: names the key, the value, what is allowed and the nearest spelling.
    """
    for key, reason in [
        ("lr", "--learning_rate"),
        *((k, "the optimizer's name") for k in fixed or {}),
    ]:
        if key in kwargs:
            raise OptimizerArgumentError(
                f"{cls.__name__}: {key}={kwargs[key]!r} cannot be given as an optimizer argument; "
                f"it is set by {reason}."
            )
    validate = getattr(cls, "validate", None)
    if validate is not None:
        validate(**kwargs)
        return
    parameters = list(inspect.signature(cls).parameters.values())[1:]  # all but params
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        known = [p.name for p in parameters if p.name != "lr" and p.name not in (fixed or {})]
        check_keys(known, kwargs, cls.__name__)
    rules = {p.name: _rule_from_default(p) for p in parameters if p.default is not p.empty}
    check_values({k: r for k, r in rules.items() if r is not None}, kwargs, cls.__name__)


def _rule_from_default(parameter: inspect.Parameter) -> Rule | None:
    """What a foreign argument may be, as far as its default tells; None where it does not."""
    default = parameter.default
    common = _COMMON_RULES.get(parameter.name)
    if isinstance(default, bool):
        return Rule(lambda value: value in (True, False), "True or False", flag().choices)
    if isinstance(default, int | float):
        rule = common or number()
        # Libraries use None for "off" or "choose yourself"; whether one does is its own business.
        return Rule(lambda value: value is None or rule.holds(value), rule.allowed)
    if isinstance(default, tuple | list) and len(default) == 2 and common is not None:
        return common if parameter.name == "betas" else None
    return None


def relative_step(optimizer_type: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether Adafactor will choose its own learning rate: by default, and with `warmup_init`.

    transformers' class does, torch's never. Then `--learning_rate` is only where its schedule
    starts, and the run has to use transformers' AdafactorSchedule in place of one of its own.
    """
    if not resolve(optimizer_type).adafactor:
        return False
    return bool(kwargs.get("relative_step", True) or kwargs.get("warmup_init", False))


def import_path(optimizer_type: str) -> str:
    """The class that `--optimizer_type` stands for, whatever name it was given by."""
    cls = resolve(optimizer_type).load()
    return f"{cls.__module__}.{cls.__name__}"


def create_optimizer(
    optimizer_type: str,
    params: Sequence[Any],
    lr: float,
    kwargs: Mapping[str, Any],
) -> tuple[str, str, torch.optim.Optimizer]:
    """Build an optimizer as stock's `get_optimizer` does.

    Returns:
        the class's path, the arguments as text (both for metadata and the log), the optimizer;
        schedule-free ones are in training mode.

    Raises:
        ValueError: see `resolve`, `OptimizerSpec.load` and `check_arguments`.
    """
    spec = resolve(optimizer_type)
    cls = spec.load()
    check_arguments(cls, kwargs, spec.fixed)
    given = {**kwargs, **{k: v for k, v in spec.presets.items() if k not in kwargs}}
    first_lr: float | None = lr
    if spec.adafactor:
        given["relative_step"] = relative_step(optimizer_type, kwargs)
        if given["relative_step"]:
            first_lr = None
            params = _without_lr(params)
    if spec.module.startswith(("dadaptation", "prodigyopt")):
        _advise_on_lr(spec.name, params, lr)
    optimizer = cls(params, lr=first_lr, **spec.fixed, **given)  # type: ignore[call-arg]
    train = getattr(optimizer, "train", None)
    if callable(train):
        train()
    arguments = ",".join(f"{key}={value}" for key, value in given.items())
    return import_path(optimizer_type), arguments, optimizer


def _without_lr(params: Sequence[Any]) -> Sequence[Any]:
    """The groups without their learning rates, which a relative step size would contradict."""
    groups = [group for group in params if isinstance(group, dict)]
    if any("lr" in group for group in groups):
        logger.warning(
            "Adafactor chooses its own step size: unet_lr and text_encoder_lr are ignored."
        )
    return [
        {key: value for key, value in group.items() if key != "lr"}
        if isinstance(group, dict)
        else group
        for group in params
    ]


def _advise_on_lr(name: str, params: Sequence[Any], lr: float) -> None:
    """D-Adaptation and Prodigy find the step size themselves; lr is a factor on it."""
    lrs = [group.get("lr", lr) for group in params if isinstance(group, dict)] or [lr]
    if lrs[0] <= 0.1:
        logger.warning("%s: the learning rate %g is too low, 1.0 is recommended.", name, lrs[0])
    if len(set(lrs)) > 1:
        logger.warning(
            "%s: of several learning rates only the first, %g, takes effect.", name, lrs[0]
        )
