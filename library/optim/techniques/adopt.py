"""The two ways from gradients to an update: Adam and ADOPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..state import Kind
from .base import TINY, Technique, Work
from .tam import Momentum


class Adam(Technique):
    """m ← β₁m + (1−β₁)·g, v ← β₂v + (1−β₂)·g², u = (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε).

    Source: Kingma and Ba, arXiv 1412.6980, algorithm 1; with decoupled weight decay it is AdamW,
    Loshchilov and Hutter, arXiv 1711.05101.

    Args:
        momentum: decides how much of g enters m.
    """

    def __init__(self, momentum: Momentum) -> None:
        self.momentum = momentum

    def state(self, role: str, entry: Mapping[str, Any], shape: torch.Size) -> dict[str, Kind]:
        return {"exp_avg": "signed", "exp_avg_sq": "positive", **self.momentum.state()}

    def apply(self, work: Work) -> None:
        beta1, beta2, g = self.momentum.beta1(work), work.beta2, work.g
        entering = work.spread((1 - beta1) * self.momentum.damping(work))
        m = work.spread(beta1) * work.state["exp_avg"] + entering * g
        v = work.spread(beta2) * work.state["exp_avg_sq"] + work.spread(1 - beta2) * (g * g)
        unbias_m, unbias_v = 1 / (1 - beta1**work.step), (1 - beta2**work.step) ** -0.5
        root = v.sqrt() * work.spread(unbias_v) + work.spread(work.eps)
        work.u = m * work.spread(unbias_m) / root
        work.state |= {"exp_avg": m, "exp_avg_sq": v}


class ADOPT(Technique):
    """v ← g² at t = 1, and nothing else; afterwards
    m ← β₁m + (1−β₁)·clip(g/max(√v, ε), ±(t−1)^¼), u = m, then v ← β₂v + (1−β₂)·g².

    v is that of the step before, so it is independent of g; that is what makes the method converge
    for any β₂. No bias correction.

    Source: Taniguchi et al., ADOPT: Modified Adam Can Converge with Any β₂ with the Optimal Rate,
    arXiv 2411.02853, algorithm 2 with clipping (updated version).

    Args:
        momentum: decides how much of the normalised gradient enters m.
    """

    def __init__(self, momentum: Momentum) -> None:
        self.momentum = momentum

    def state(self, role: str, entry: Mapping[str, Any], shape: torch.Size) -> dict[str, Kind]:
        return {"exp_avg": "signed", "exp_avg_sq": "positive", **self.momentum.state()}

    def apply(self, work: Work) -> None:
        g, m, v = work.g, work.state["exp_avg"], work.state["exp_avg_sq"]
        # At t = 1 the clip is 0 and so are m and u; weight decay and v's own past are left out.
        goes_on = torch.where(work.step > 1, 1.0, 0.0)
        clip = work.spread((work.step - 1) ** 0.25)
        # 1/max(√v, ε), the larger of the two squared: v below TINY is nothing in float32.
        floor = (work.eps * work.eps).clamp_min(TINY)
        inverse = torch.maximum(v, work.spread(floor)).rsqrt()
        normalised = torch.maximum(torch.minimum(g * inverse, clip), -clip)
        beta1 = self.momentum.beta1(work)
        entering = work.spread((1 - beta1) * self.momentum.damping(work))
        m = work.spread(beta1) * m + entering * normalised
        past = work.beta2 * goes_on
        work.u = m
        work.weight_decay = work.weight_decay * goes_on
        work.state |= {
            "exp_avg": m,
            "exp_avg_sq": work.spread(past) * v + work.spread(1 - past) * (g * g),
        }
