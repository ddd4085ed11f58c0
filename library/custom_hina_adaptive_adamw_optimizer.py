"""AdaptiveHinaAdamW: AdamW with 8-bit state that finds out which parameters belong together."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import Tensor

from library.optim import adaptive_reports as reports
from library.optim.arguments import OptimizerArgumentError, Rule, flag, number, plain, whole_number
from library.optim.hina import HinaOptimizer, update_links
from library.optim.techniques import (
    Descent,
    DynamicWeightDecay,
    Importance,
    LRMask,
    Relations,
    SelectiveProjection,
)
from library.optim.techniques.spd import Anchor

logger = logging.getLogger(__name__)

_MASK = ("lr_bump", "min_lr", "max_lr", "warmup_steps")  # what LRMask takes


class AdaptiveHinaAdamW(HinaOptimizer):
    """HinaAdamW's techniques without those that need names, and three that find out by themselves
    what names would tell: relations, importance and lr_mask (spec 1 §4).

    With every switch off it is `torch.optim.AdamW`. The techniques act in the order of the
    arguments below; each one's file in `library/optim/techniques` states its equation and source.

    Args:
        params: tensors, `(name, tensor)` pairs, or parameter groups. Names are not needed; where
            there are any they decide which parameters are partners.
        lr: learning rate; groups may set their own, as with `betas`, `eps` and `weight_decay`.
        betas: decay of the first and second moment, each in [0, 1).
        eps: floor of the denominator, at least float32's smallest normal number (1.2e-38).
        weight_decay: decoupled weight decay.
        use_orthogonal_grad: only the part of the gradient orthogonal to the parameter.
        use_agr: damp elements that hold much of the gradient.
        use_adopt_stability: ADOPT with clipping; off, Adam with bias correction.
        use_tam: damp gradients that turn against the momentum; `tam_beta` smooths the measure.
        use_grams: the gradient's sign on the momentum's magnitude.
        use_cautious: no step where update and gradient disagree. Masks nothing after Grams.
        use_dynamic_adaptation: importance and relations. `importance_decay` smooths importances,
            `adaptation_strength` is the mean of their factors on lr;
            `relationship_discovery_interval` is in steps, and parameters of less
            compatibility than `compatibility_threshold` are no partners.
        use_lr_mask: a learning rate for each element, which until the step `warmup_steps` rises by
            `lr_bump` where the gradient keeps its sign and falls where it flips, between `min_lr`
            and `max_lr`.
        dynamic_weight_decay: weight decay falls after `wd_transition_steps` steps, by
            `wd_decay_factor`, to no less than `wd_min_ratio`.
        use_spd: pull back by `spd_lambda` where a step leads away from the anchor. `spd_anchor` is
            `zero`, which needs no memory; `initial`, where weights were trained before; or `auto`
            (zero for adapter roles, else initial).
        optim_bits: 8 or 32 bits for each moment.
        min_8bit_size: tensors with fewer elements keep float32 moments.
        bf16_rounding: `stochastic` or `nearest`, for bfloat16 and float16 parameters.
        nonfinite: `raise` on NaN or infinity in a gradient, or `skip` the step.
        backend: `auto` runs the step as machine code where there is a C++ compiler, `compiled`
            insists on it, `eager` never does.

    Raises:
        OptimizerArgumentError: (a ValueError) an impossible value; says what is allowed.
        NonFiniteGradientError: from `step`, naming the tensors; nothing was changed.
    """

    VERSION: ClassVar[str] = "1.0"
    SWITCHES: ClassVar[tuple[str, ...]] = (
        *HinaOptimizer.SWITCHES,
        "use_dynamic_adaptation",
        "use_lr_mask",
    )
    RULES: ClassVar[dict[str, Rule]] = {
        **HinaOptimizer.RULES,
        "use_dynamic_adaptation": flag(),
        "adaptation_strength": number(0, open_low=True),
        "relationship_discovery_interval": whole_number(1),
        "importance_decay": number(0, 1, open_high=True),
        "compatibility_threshold": number(0, 1),
        "use_lr_mask": flag(),
        "lr_bump": number(0, open_low=True),
        "min_lr": number(0),
        "max_lr": number(0, open_low=True),
        "warmup_steps": whole_number(0),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        use_orthogonal_grad: bool = False,
        use_agr: bool = True,
        use_adopt_stability: bool = True,
        use_tam: bool = True,
        tam_beta: float = 0.999,
        use_grams: bool = True,
        use_cautious: bool = True,
        use_dynamic_adaptation: bool = True,
        adaptation_strength: float = 1.0,
        relationship_discovery_interval: int = 100,
        importance_decay: float = 0.95,
        compatibility_threshold: float = 0.3,
        use_lr_mask: bool = True,
        lr_bump: float = 3e-6,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
        warmup_steps: int = 500,
        dynamic_weight_decay: bool = True,
        wd_transition_steps: int = 1000,
        wd_decay_factor: float = 0.7,
        wd_min_ratio: float = 0.1,
        use_spd: bool = True,
        spd_lambda: float = 0.06,
        spd_anchor: Anchor = "zero",
        optim_bits: int = 8,
        min_8bit_size: int = 4096,
        bf16_rounding: Literal["stochastic", "nearest"] = "stochastic",
        nonfinite: Literal["raise", "skip"] = "raise",
        backend: Literal["auto", "compiled", "eager"] = "auto",
    ) -> None:
        given = {key: plain(value) for key, value in locals().items() if key in self.RULES}
        self.validate(**given)
        self.settings = given
        self.lr_mask = LRMask(*(given[key] for key in _MASK))
        importance = Importance(given["importance_decay"], given["adaptation_strength"])
        relations = Relations(
            given["relationship_discovery_interval"], given["compatibility_threshold"]
        )
        decay = DynamicWeightDecay(
            given["wd_transition_steps"],
            given["wd_decay_factor"],
            given["wd_min_ratio"],
            others="lora",  # without names any parameter may be an adapter's
        )
        links = [
            *update_links(given),
            (use_dynamic_adaptation, importance),
            (use_dynamic_adaptation, relations),
            (use_lr_mask, self.lr_mask),
            (dynamic_weight_decay, decay),
            (True, Descent()),
            (use_spd, SelectiveProjection(given["spd_lambda"], spd_anchor)),
        ]
        super().__init__(params, given, links)
        highest = max(group["lr"] for group in self.param_groups)
        if use_lr_mask and highest > given["max_lr"]:
            logger.warning(
                "AdaptiveHinaAdamW: lr_mask holds the learning rate, %g, down to max_lr=%g. Raise "
                "max_lr, or set use_lr_mask=False.",
                highest,
                given["max_lr"],
            )

    @classmethod
    def validate(cls, **kwargs: Any) -> None:
        """Check arguments without building anything.

        Raises:
            OptimizerArgumentError: names the key, the value, what is allowed and the nearest key.
        """
        super().validate(**kwargs)
        defaults = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
        given = {key: plain(kwargs.get(key, defaults[key])) for key in _MASK}
        if given["min_lr"] > given["max_lr"]:
            raise OptimizerArgumentError(
                f"{cls.__name__}: min_lr={given['min_lr']:g} is above max_lr={given['max_lr']:g}."
            )
        if not LRMask(*given.values()).fits:
            raise OptimizerArgumentError(
                f"{cls.__name__}: with lr_bump={given['lr_bump']:g} lr_mask could move by more "
                f"than {LRMask.MOST_BUMPS} bumps in {given['warmup_steps']} steps between "
                f"min_lr={given['min_lr']:g} and max_lr={given['max_lr']:g}, which is all that it "
                "can hold. Give a larger lr_bump or fewer warmup_steps."
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"settings": self.settings, "lr_mask": self.lr_mask}

    def masks(self, param: Tensor) -> Tensor | None:
        """The `lr_mask` of each element of a parameter: float64, exactly what it was moved to
        (what the scheduler has taken off since is not in it); None before the first step and with
        `use_lr_mask=False`."""
        on = self.switches["use_lr_mask"]
        return self.lr_mask.masks(self.state.get(param, {})) if on else None

    def get_optimization_info(self) -> dict[str, Any]:
        """Settings, and where training stands. `total_params` counts tensors. It looks at every
        element of lr_mask: not to be called at every step."""
        return reports.optimization_info(self)

    def get_relationship_summary(self) -> dict[str, Any]:
        """Which parameters have found a partner, one entry for each."""
        return reports.relationship_summary(self)

    def get_importance_analysis(self) -> dict[str, Any]:
        """How importance is distributed over the parameters."""
        return reports.importance_analysis(self)

    def get_lr_mask_analysis(self) -> dict[str, Any]:
        """Where each parameter's learning rates lie, as factors on lr. It looks at every element:
        not to be called at every step."""
        return reports.lr_mask_analysis(self)

    def snapshot(self) -> dict[str, Any]:
        """What has been found of each parameter until now, in JSON's types (keys: see
        `adaptive_reports.snapshot`). It looks at every element: not to be called at every step."""
        return reports.snapshot(self)

    def get_buffer_pool_stats(self) -> dict[str, Any]:
        """The scratch memory that is kept between discoveries."""
        return reports.buffer_pool_stats(self)

    def clear_buffer_pool(self) -> None:
        """Free the scratch memory."""
        self.scratch.clear()
