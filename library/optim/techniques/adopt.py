"""The two ways from gradients to an update: Adam and ADOPT."""

from __future__ import annotations

import torch

from ..state import Kind
from .base import Technique, Work
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

    def state(self, role: str) -> dict[str, Kind]:
        return {"exp_avg": "signed", "exp_avg_sq": "positive", **self.momentum.state()}

    def apply(self, work: Work) -> None:
        beta1, beta2 = work.betas
        damping = self.momentum.damping(work)
        m = beta1 * work.state["exp_avg"] + (1 - beta1) * (damping * work.g)
        v = beta2 * work.state["exp_avg_sq"] + (1 - beta2) * work.g.square()
        root = v.sqrt() / (1 - beta2**work.step) ** 0.5 + work.eps
        work.u = m / root / (1 - beta1**work.step)
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

    def state(self, role: str) -> dict[str, Kind]:
        return {"exp_avg": "signed", "exp_avg_sq": "positive", **self.momentum.state()}

    def apply(self, work: Work) -> None:
        beta1, beta2 = work.betas
        v = work.state["exp_avg_sq"]
        if work.step == 1:
            work.state["exp_avg_sq"] = work.g.square()
            work.u = torch.zeros_like(work.g)
            work.weight_decay = 0.0
            return
        clip = (work.step - 1) ** 0.25
        normalised = (work.g / v.sqrt().clamp_min(work.eps)).clamp(-clip, clip)
        damping = self.momentum.damping(work)
        m = beta1 * work.state["exp_avg"] + (1 - beta1) * (damping * normalised)
        work.u = m
        work.state |= {"exp_avg": m, "exp_avg_sq": beta2 * v + (1 - beta2) * work.g.square()}
