"""The CameAMP family's one chain, with its parts switched by a config (spec 1 §5)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from .arguments import Rule, number
from .batch import Turn
from .cameamp_config import RULES, OptimizerConfig
from .context import ContextAwareLR
from .engine import ChainOptimizer
from .overview import Overview
from .regularization import (
    BackgroundRegularization,
    EdgeSuppression,
    FrequencyPenalty,
    RankPenalty,
    RegularizationStrategy,
    SpatialAwareness,
)
from .regularize import Regularizers
from .techniques import (
    AGR,
    CAME,
    Adam,
    AdaptiveDecay,
    Cautious,
    Confidence,
    Consistent,
    Descent,
    FadingGrams,
    Momentum,
    OrthogonalGradient,
    RowScale,
    SelectiveProjection,
    Technique,
    TorqueAware,
    Work,
)
from .techniques.base import FOREVER, TINY
from .telemetry import optimizer_report

logger = logging.getLogger(__name__)

PHASES = ("early_warmup", "late_warmup", "stable", "mature")


def phase_of(step: int, warmup_steps: int) -> str:
    """The phase that a parameter's step, counted from 1, belongs to."""
    if step < warmup_steps / 2:
        return PHASES[0]
    if step < warmup_steps:
        return PHASES[1]
    return PHASES[2] if step < 2 * warmup_steps else PHASES[3]


class ContextRate(Technique):
    """Multiplies lr by what `ContextAwareLR` makes of losses and of the directions of gradients:
    the cosine of gradient and momentum, a mean over tensors.

    Stands before the momentum moves.
    """

    def __init__(self, context: ContextAwareLR) -> None:
        self.context = context

    def prepare(self, overview: Overview) -> Tensor | None:
        self.context.advance()
        multiplier = self.context.compute_contextual_lr_multiplier()
        return torch.full((len(overview.entries),), multiplier, dtype=torch.float64)

    def apply(self, work: Work) -> None:
        m, g = work.state["exp_avg"], work.grad
        mg, mm, gg = work.sum(m * g), work.sum(m * m), work.sum(g * g)
        known = (mm > 0) & (gg > 0)
        cosine = mg / (mm.sqrt() * gg.sqrt()).clamp_min(TINY)
        work.report["c_optim/cosine"] = torch.where(known, cosine, 0.0)
        work.report["c_optim/known"] = torch.where(known, 1.0, 0.0)
        work.report["c_optim/multiplier"] = work.factors[self]
        work.pace = work.pace * work.factors[self]

    def conclude(self, overview: Overview) -> None:
        known = overview.reported["c_optim/known"].nan_to_num()
        if known.any():
            cosines = overview.reported["c_optim/cosine"].nan_to_num()
            self.context.note_direction(float(cosines.sum() / known.sum()))


class CameAMP(ChainOptimizer):
    """The optimizer that all classes of the family are, with defaults of their own.

    Args:
        params: tensors, `(name, tensor)` pairs, or parameter groups.
        config: everything else.
    """

    # A schedule may bring a group's learning rate to zero.
    RULES: ClassVar[dict[str, Rule]] = {**RULES, "lr": number(0)}
    SWITCHES: ClassVar[tuple[str, ...]] = (
        "came",
        "use_agr",
        "use_orthogonal_grad",
        "use_tam",
        "use_grams",
        "use_consistency",
        "use_cautious",
        "use_row_scaling",
        "use_lr_mask",
        "adaptive_weight_decay",
        "use_spd",
        "c_optim",
    )

    def __init__(self, params: Iterable[Any], config: OptimizerConfig) -> None:
        self.config = config
        self.c_optim = _context(config) if config.c_optim else None
        self.lr_mask = config.lr_mask()
        self.regularizers = Regularizers(
            _regularizers(config),
            config.regularization_interval,
            partial(phase_of, warmup_steps=config.warmup_steps),
        )
        super().__init__(
            params,
            {
                "lr": config.lr,
                "betas": config.betas,
                "eps": config.eps,
                "weight_decay": config.weight_decay,
            },
            _chain(config, self.c_optim, self.lr_mask),
            optim_bits=config.bits,
            min_8bit_size=config.min_8bit_size,
            bf16_rounding=config.bf16_rounding,
            nonfinite=config.nonfinite,
            backend=config.backend,
            stochastic_codes=config.error_correction,
        )
        highest = max(group["lr"] for group in self.param_groups)
        if config.use_lr_mask and highest > config.max_lr:
            logger.warning(
                "%s: lr_mask holds the learning rate, %g, down to max_lr=%g. Raise max_lr, or set "
                "use_lr_mask=False.",
                type(self).__name__,
                highest,
                config.max_lr,
            )

    def __getstate__(self) -> dict[str, Any]:
        own = ("config", "c_optim", "lr_mask", "regularizers")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    @property
    def global_step(self) -> int:
        """The steps of the parameter that has taken most."""
        return max((entry["step"] for entry in self.state.values() if "step" in entry), default=0)

    @property
    def phase(self) -> str:
        """The phase of the last step; before one, that of the first."""
        return phase_of(max(self.global_step, 1), self.config.warmup_steps)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns, whose loss C-Optim notes.

        Raises:
            as `ChainOptimizer.step`; ValueError: a loss from `closure` that is not finite.
        """
        if closure is not None and self.c_optim is not None:
            closure = self._noting(closure)
        loss = super().step(closure)
        if self.config.verbose:
            print(self._told())
        return loss

    def update_context(self, loss: float | Tensor) -> None:
        """Tell C-Optim the loss of the step that comes; nothing without `c_optim`. Of several
        processes it has to be their mean, or the processes drift apart. One that is not finite is
        passed over with `nonfinite="skip"`, as the step will be.

        Raises:
            ValueError: a loss that is not finite, or none.
        """
        if self.c_optim is None:
            return
        if loss is None:
            raise ValueError("C-Optim needs the loss: the closure of `step` has to return it.")
        plain = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if isfinite(plain) or self.nonfinite == "raise":
            self.c_optim.note_loss(plain)

    def state_dict(self) -> dict[str, Any]:
        """As `ChainOptimizer.state_dict`, with what C-Optim knows under `c_optim`."""
        saved = super().state_dict()
        if self.c_optim is not None:
            saved["c_optim"] = self.c_optim.state_dict()
        return saved

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bit for bit. C-Optim begins anew where it saved nothing.

        Raises:
            as `ChainOptimizer.load_state_dict`; ValueError: an impossible state of C-Optim.
        """
        context = None
        if self.c_optim is not None:
            context = _context(self.config)
            if "c_optim" in state_dict:
                context.load_state_dict(state_dict["c_optim"])
        super().load_state_dict(state_dict)
        if self.c_optim is not None and context is not None:
            self.c_optim.load_state_dict(context.state_dict())

    def masks(self, param: Tensor) -> Tensor | None:
        """The `lr_mask` of each element of a parameter: float64, exactly what it was moved to
        (what the scheduler has taken off since is not in it); None before the first step and with
        `use_lr_mask=False`."""
        on = self.config.use_lr_mask
        return self.lr_mask.masks(self.state.get(param, {})) if on else None

    def get_memory_stats(self) -> dict[str, float]:
        """Bytes of all state that is held.

        `total_quantized_memory`: of what is in 8 bits, with its scales;
        `total_high_precision_memory`: of all else, lr_mask included; `compression_ratio`: what the
        same numbers would take in float32, divided by what they take. All 0 before the first step,
        the ratio 1.
        """
        quantized = high = numbers = 0
        for param, entry in self.state.items():
            for slot in self.variant(param).slots if "step" in entry else ():
                held = [entry[name] for name in slot.names]
                size = sum(one.nbytes for one in held)
                numbers += held[0].numel()
                if slot.coded:
                    quantized += size
                else:
                    high += size
        total = quantized + high
        return {
            "total_quantized_memory": quantized,
            "total_high_precision_memory": high,
            "compression_ratio": 4 * numbers / total if total else 1.0,
        }

    def get_optimization_info(self) -> dict[str, Any]:
        """Settings and where training stands; `total_params` counts tensors."""
        settings = vars(self.config)
        return {
            "optimizer_type": type(self).__name__,
            "total_params": len(self.roles.role),
            "features": {
                **{name: settings[name] for name in self.SWITCHES},
                "optim_bits": self.optim_bits,
                "min_8bit_size": self.min_8bit_size,
                "bf16_rounding": self.bf16_rounding,
                "nonfinite": self.nonfinite,
                "backend": self.backend,
                "nonfinite_skipped_steps": self.skipped_steps,
            },
            "regularizers": [type(one).__name__ for one in self.regularizers.strategies],
            "plans": self._plans(),
            "training_stats": {
                "global_step": self.global_step,
                "phase": self.phase,
                "lr_multiplier": (
                    self.c_optim.compute_contextual_lr_multiplier() if self.c_optim else 1.0
                ),
            },
        }

    def _regularize(self, turns: Sequence[Turn]) -> bool:
        names = self.roles.names
        acted = [
            self.regularizers.act_on(turn, [names[param] for param in turn.params])
            for turn in turns
        ]
        return any(acted)

    def _noting(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def noting() -> Any:
            loss = closure()
            self.update_context(loss)
            return loss

        return noting

    def _plans(self) -> list[str]:
        """What a log should say of the run to come."""
        turn, end = _turn(self.config), self.config.warmup_steps
        lines = [f"early warm-up until step {turn}, late until {end}, stable until {2 * end}"]
        if self.config.use_lr_mask:
            lines.append(
                f"lr_mask moves until step {end}, by {self.config.lr_bump:g} a step between "
                f"{self.config.min_lr:g} and {self.config.max_lr:g}"
            )
        if self.regularizers.strategies:
            names = ", ".join(type(one).__name__ for one in self.regularizers.strategies)
            every = self.regularizers.interval
            lines.append(f"regularizers act every {every} steps, first at step 1: {names}")
        return lines

    def _told(self) -> str:
        """The last step in one line."""
        lrs = sorted({group["lr"] for group in self.param_groups})
        words = [f"lr {', '.join(f'{lr:.3g}' for lr in lrs)}"]
        report = optimizer_report(self)
        words += [f"{name} {report[key]:.4g}" for key, name in _TOLD.items() if key in report]
        if self.c_optim is not None:
            words.append(f"multiplier {self.c_optim.compute_contextual_lr_multiplier():.4g}")
        return f"{type(self).__name__} step {self.global_step} ({self.phase}): {', '.join(words)}"


_TOLD = {
    "lr_mask/factor": "lr_mask's mean factor",
    "tam/alignment": "alignment",
    "cautious/masked_share": "masked share",
    "spd/projected_share": "pulled back",
}


def _context(config: OptimizerConfig) -> ContextAwareLR:
    return ContextAwareLR(
        config.context_window,
        config.stagnation_threshold,
        config.adaptation_rate,
        config.momentum_scales,
    )


def _turn(config: OptimizerConfig) -> int:
    """The first step of late warm-up."""
    return max(1, (config.warmup_steps + 1) // 2)


def _during(steps: range, technique: Technique) -> Technique:
    technique.steps = steps
    return technique


def _chain(
    config: OptimizerConfig, context: ContextAwareLR | None, mask: Technique
) -> list[Technique]:
    """The techniques that are on. Those that ask for a sum of the gradient alone go first: that is
    known from the look at gradients."""
    early, later = range(1, _turn(config)), range(_turn(config), FOREVER)
    torque = TorqueAware(config.tam_beta) if config.use_tam else Momentum()
    consistent = Consistent(config.beta1_decay) if config.use_consistency else Momentum()
    anchor = config.spd_anchor
    if anchor == "auto":
        anchor = "initial" if config.full_finetune else "adapter"
    links: list[tuple[bool, Technique]] = [
        (context is not None, ContextRate(context or _context(config))),
        (config.use_agr, AGR()),
        (config.use_orthogonal_grad, _during(early, OrthogonalGradient())),
        (config.momentum is None, _during(early, _average(config, torque))),
        (config.momentum is None, _during(later, _average(config, consistent))),
        (config.momentum is not None, _average(config, config.momentum or Momentum())),
        (config.use_grams, _during(early, FadingGrams(config.beta1_decay))),
        (config.use_cautious, _during(later, Cautious())),
        (config.came, Confidence()),
        (config.use_row_scaling and not config.full_finetune, RowScale(config.eta)),
        (config.use_lr_mask, mask),
        (config.adaptive_weight_decay, AdaptiveDecay()),
        (True, Descent()),
        (config.use_spd, SelectiveProjection(config.spd_lambda, anchor)),
    ]
    return [technique for on, technique in links if on]


def _average(config: OptimizerConfig, momentum: Momentum) -> Technique:
    """From a gradient to the momentum."""
    return CAME(momentum, config.clip_threshold) if config.came else Adam(momentum)


def _regularizers(config: OptimizerConfig) -> list[RegularizationStrategy]:
    """Those that are on, and the user's own behind them."""
    built_in: list[tuple[bool, RegularizationStrategy]] = [
        (config.edge_suppression, EdgeSuppression(config.edge_threshold, config.edge_penalty)),
        (config.frequency_penalty > 0, FrequencyPenalty(config.frequency_penalty)),
        (config.background_regularization, BackgroundRegularization()),
        (config.spatial_awareness, SpatialAwareness(config.detail_preservation)),
        (
            config.lora_rank_penalty,
            RankPenalty(config.rank_penalty_strength, config.low_rank_emphasis),
        ),
    ]
    return [one for on, one in built_in if on] + list(config.extra_regularizers)
