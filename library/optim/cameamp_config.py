"""What can be set of the CameAMP family: names, defaults, limits and profiles (spec 1 §5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from . import context
from .arguments import (
    OptimizerArgumentError,
    Rule,
    check_keys,
    check_values,
    flag,
    number,
    one_of,
    plain,
    several,
    whole_number,
)
from .layout import BLOCK
from .regularization import RegularizationStrategy
from .spelling import did_you_mean
from .techniques import LRMask, Momentum
from .techniques.base import TINY
from .techniques.spd import Anchor

NO_REGULARIZERS: Mapping[str, Any] = {
    "edge_suppression": False,
    "frequency_penalty": 0.0,
    "background_regularization": False,
    "spatial_awareness": False,
    "lora_rank_penalty": False,
}

PROFILES: Mapping[str, Mapping[str, Any]] = {
    "balanced": {},
    "memory_optimized": {**NO_REGULARIZERS, "force_8bit": True, "min_8bit_size": 1024},
    "quality_optimized": {
        "edge_suppression": True,
        "edge_penalty": 0.15,
        "frequency_penalty": 0.08,
        "background_regularization": True,
        "spatial_awareness": True,
        "lora_rank_penalty": True,
        "rank_penalty_strength": 0.02,
    },
}

_share = number(0, 1)
_between = number(0, 1, open_low=True, open_high=True)
_beta = number(0, 1, open_high=True)

RULES: dict[str, Rule] = {
    "lr": number(0, open_low=True),
    "min_lr": number(0),
    "max_lr": number(0, open_low=True),
    "lr_bump": number(0, open_low=True),
    "warmup_steps": whole_number(1),
    # A zero in float32 would divide zero by zero where a gradient is zero.
    "eps": several(3, number(TINY)),
    "betas": several(3, _beta),
    "clip_threshold": number(0, open_low=True),
    "eta": number(0, open_low=True),
    "beta1_decay": number(0, 1, open_low=True),
    "weight_decay": number(0),
    "came": flag(),
    "full_finetune": flag(),
    "verbose": flag(),
    "use_agr": flag(),
    "use_orthogonal_grad": flag(),
    "use_tam": flag(),
    "tam_beta": _beta,
    "use_grams": flag(),
    "use_consistency": flag(),
    "use_cautious": flag(),
    "use_row_scaling": flag(),
    "use_lr_mask": flag(),
    "adaptive_weight_decay": flag(),
    "use_spd": flag(),
    "spd_lambda": number(0),
    "spd_anchor": one_of("auto", "zero", "initial"),
    "momentum": Rule(
        lambda value: value is None or isinstance(value, Momentum), "a MomentumStrategy, or None"
    ),
    "edge_suppression": flag(),
    "edge_threshold": _between,
    "edge_penalty": _share,
    "frequency_penalty": _share,
    "background_regularization": flag(),
    "spatial_awareness": flag(),
    "detail_preservation": _share,
    "lora_rank_penalty": flag(),
    "rank_penalty_strength": _share,
    "low_rank_emphasis": number(0),
    "regularization_interval": whole_number(1),
    "extra_regularizers": Rule(
        lambda value: (
            isinstance(value, tuple | list)
            and all(isinstance(one, RegularizationStrategy) for one in value)
        ),
        "a list of RegularizationStrategy objects",
    ),
    "optim_bits": one_of(8, 32),
    "block_size": one_of(BLOCK),
    "error_correction": flag(),
    "force_8bit": flag(),
    "min_8bit_size": whole_number(0),
    "c_optim": flag(),
    "context_window": context.RULES["context_window"],
    "stagnation_threshold": context.RULES["edge_threshold"],
    "adaptation_rate": context.RULES["adaptation_rate"],
    "momentum_scales": context.RULES["momentum_scales"],
    "bf16_rounding": one_of("stochastic", "nearest"),
    "nonfinite": one_of("raise", "skip"),
    "backend": one_of("auto", "compiled", "eager"),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """Everything that can be set of an optimizer of the CameAMP family.

    The defaults are those of the `balanced` profile. `vars(config)` is a plain dict that makes an
    equal config again: `OptimizerConfig(**vars(config))`.

    Attributes:
        lr: learning rate.
        min_lr, max_lr, lr_bump: the learning rate of each element moves between these, by so much
            a step, until `warmup_steps`.
        warmup_steps: the steps of both warm-up phases; the first ends at half of them.
        eps: added to the squared gradient, to the squared departure from the momentum, and to
            torque (with `came` off, to Adam's denominator).
        betas: decay of the momentum, of the second moment and of the departure's.
        clip_threshold: the normalised gradient's RMS is clipped to this.
        eta: a row of zeros moves at this multiple of the rate (ALLoRA).
        beta1_decay: the momentum's decay falls by this factor a step, down to 0.4; Grams fades by
            it.
        weight_decay: decoupled weight decay.
        came: CAME; off, Adam's second moment of every element with bias correction.
        full_finetune: whole weights are trained and not an adapter: no row scaling, and `auto`
            anchors are the initial weights.
        verbose: print a line at every step.
        use_agr, use_orthogonal_grad, use_tam, use_grams, use_consistency, use_cautious,
            use_row_scaling, use_lr_mask, adaptive_weight_decay, use_spd: techniques, each of which
            can be switched off alone. `tam_beta` smooths torque; `spd_lambda` and `spd_anchor` are
            as for HinaAdamW.
        momentum: a strategy of momentum for all phases, in place of torque-aware momentum in early
            warm-up and consistent momentum afterwards.
        edge_suppression, edge_threshold, edge_penalty: see `regularization.EdgeSuppression`.
        frequency_penalty: see `regularization.FrequencyPenalty`; 0 is off.
        background_regularization: see `regularization.BackgroundRegularization`.
        spatial_awareness, detail_preservation: see `regularization.SpatialAwareness`.
        lora_rank_penalty, rank_penalty_strength, low_rank_emphasis: see
            `regularization.RankPenalty`.
        regularization_interval: regularizers act on the gradients of every so many steps, the
            first included. At 1 they cost more than all else together.
        extra_regularizers: regularizers of one's own, which act behind the others.
        optim_bits: 8 or 32 bits for each moment. `force_8bit` is 8 whatever `optim_bits` says.
        min_8bit_size: tensors with fewer elements keep float32 moments.
        block_size: elements that share a scale; the engine has 256.
        error_correction: 8-bit state is rounded stochastically, so that errors average out to
            nothing, without memory for them; off, to the nearest, where small changes are lost.
        c_optim: a multiplier on lr from the course of loss and gradients, see
            `context.ContextAwareLR`: `context_window`, `stagnation_threshold` (its
            `edge_threshold`), `adaptation_rate` and `momentum_scales` are its arguments.
        bf16_rounding, nonfinite, backend: as for HinaAdamW.

    Raises:
        OptimizerArgumentError: (a ValueError) a field is impossible; names it and what is allowed.
    """

    lr: float = 1e-6
    min_lr: float = 1e-7
    max_lr: float = 1e-3
    lr_bump: float = 3e-6
    warmup_steps: int = 500
    eps: tuple[float, float, float] = (1e-30, 1e-16, 1e-8)
    betas: tuple[float, float, float] = (0.8, 0.99, 0.999)
    clip_threshold: float = 1.0
    eta: float = 2.0
    beta1_decay: float = 0.9995
    weight_decay: float = 5e-4
    came: bool = True
    full_finetune: bool = False
    verbose: bool = False
    use_agr: bool = True
    use_orthogonal_grad: bool = True
    use_tam: bool = True
    tam_beta: float = 0.9
    use_grams: bool = True
    use_consistency: bool = True
    use_cautious: bool = True
    use_row_scaling: bool = True
    use_lr_mask: bool = True
    adaptive_weight_decay: bool = True
    use_spd: bool = True
    spd_lambda: float = 0.06
    spd_anchor: Anchor = "auto"
    momentum: Momentum | None = None
    edge_suppression: bool = True
    edge_threshold: float = 0.6
    edge_penalty: float = 0.1
    frequency_penalty: float = 0.05
    background_regularization: bool = True
    spatial_awareness: bool = True
    detail_preservation: float = 0.8
    lora_rank_penalty: bool = True
    rank_penalty_strength: float = 0.01
    low_rank_emphasis: float = 1.2
    regularization_interval: int = 10
    extra_regularizers: Sequence[RegularizationStrategy] = field(default=())
    optim_bits: int = 32
    block_size: int = BLOCK
    error_correction: bool = True
    force_8bit: bool = False
    min_8bit_size: int = 4096
    c_optim: bool = False
    context_window: int = 100
    stagnation_threshold: float = 0.95
    adaptation_rate: float = 0.1
    momentum_scales: Sequence[int] = (1, 5, 10, 25)
    bf16_rounding: Literal["stochastic", "nearest"] = "stochastic"
    nonfinite: Literal["raise", "skip"] = "raise"
    backend: Literal["auto", "compiled", "eager"] = "auto"

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, plain(getattr(self, one.name)))
        check_values(RULES, vars(self), "OptimizerConfig")
        if self.min_lr >= self.max_lr:
            raise OptimizerArgumentError(
                f"OptimizerConfig: min_lr={self.min_lr:g} is not below max_lr={self.max_lr:g}."
            )
        if self.use_lr_mask:
            self._check_mask()

    def _check_mask(self) -> None:
        if not self.lr_mask().fits:
            raise OptimizerArgumentError(
                f"OptimizerConfig: with lr_bump={self.lr_bump:g} lr_mask could move by more than "
                f"{LRMask.MOST_BUMPS} bumps in warmup_steps={self.warmup_steps} between "
                f"min_lr={self.min_lr:g} and max_lr={self.max_lr:g}, which is all that it can hold."
                " Give a larger lr_bump or fewer warmup_steps."
            )

    @classmethod
    def of_profile(
        cls, profile: str = "balanced", presets: Mapping[str, Any] | None = None, **options: Any
    ) -> OptimizerConfig:
        """A profile with some fields set otherwise: `options` win over the profile, and this wins
        over `presets`.

        Raises:
            OptimizerArgumentError: no such profile or field, or an impossible value.
        """
        if profile not in list(PROFILES):  # a list, too, is no profile
            raise OptimizerArgumentError(
                f"There is no profile {profile!r}.{did_you_mean(str(profile), PROFILES)} "
                f"Profiles: {', '.join(PROFILES)}."
            )
        check_keys([*RULES, "profile"], options, cls.__name__)
        return cls(**{**(presets or {}), **PROFILES[profile], **options})

    def lr_mask(self) -> LRMask:
        """The technique that holds a learning rate for each element."""
        return LRMask(self.lr_bump, self.min_lr, self.max_lr, self.warmup_steps)

    @property
    def bits(self) -> int:
        """8 or 32."""
        return 8 if self.force_8bit else self.optim_bits
