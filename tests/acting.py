"""What an optimizer of the family acts by, read from the parts that do the work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from library.optim.engine import ChainOptimizer
from library.optim.techniques import (
    ADOPT,
    AGR,
    Cautious,
    DynamicWeightDecay,
    Grams,
    Importance,
    LRMask,
    OrthogonalGradient,
    PairScale,
    Relations,
    SelectiveProjection,
    TorqueAware,
)

_SWITCHES = {
    "use_orthogonal_grad": OrthogonalGradient,
    "use_agr": AGR,
    "use_adopt_stability": ADOPT,
    "use_tam": TorqueAware,
    "use_grams": Grams,
    "use_cautious": Cautious,
    "use_alora": PairScale,
    "use_dynamic_adaptation": Importance,
    "use_lr_mask": LRMask,
    "dynamic_weight_decay": DynamicWeightDecay,
    "use_spd": SelectiveProjection,
}
_FIGURES = {
    "tam_beta": (TorqueAware, "beta"),
    "alora_ratio": (PairScale, "ratio"),
    "importance_decay": (Importance, "decay"),
    "adaptation_strength": (Importance, "strength"),
    "relationship_discovery_interval": (Relations, "interval"),
    "compatibility_threshold": (Relations, "threshold"),
    "lr_bump": (LRMask, "bump"),
    "min_lr": (LRMask, "low"),
    "max_lr": (LRMask, "high"),
    "warmup_steps": (LRMask, "warmup_steps"),
    "wd_transition_steps": (DynamicWeightDecay, "transition_steps"),
    "wd_decay_factor": (DynamicWeightDecay, "factor"),
    "wd_min_ratio": (DynamicWeightDecay, "min_ratio"),
    "spd_lambda": (SelectiveProjection, "strength"),
    "spd_anchor": (SelectiveProjection, "anchor"),
}
_OF_GROUPS = ("betas", "eps", "weight_decay")
_OF_ALL = ("optim_bits", "min_8bit_size", "bf16_rounding", "nonfinite", "backend")


def acting(optimizer: ChainOptimizer) -> dict[str, Any]:
    """Every argument but lr as it acts; those of a technique that is off are missing."""
    parts = {type(part): part for part in _parts(optimizer)}
    (values,) = {tuple(group[key] for key in _OF_GROUPS) for group in optimizer.param_groups}
    return {
        **dict(zip(_OF_GROUPS, values, strict=True)),
        **{key: part in parts for key, part in _SWITCHES.items()},
        **{
            key: getattr(parts[part], name)
            for key, (part, name) in _FIGURES.items()
            if part in parts
        },
        **{key: getattr(optimizer, key) for key in _OF_ALL},
    }


def _parts(optimizer: ChainOptimizer) -> Iterator[object]:
    for technique in optimizer.chain:
        yield technique
        yield getattr(technique, "momentum", None)
