"""Strategies of momentum: how much of a gradient enters the first moment, and how long it stays."""

from __future__ import annotations

from torch import Tensor

from ..state import Kind
from .base import TINY, Work


class Momentum:
    """m ← β₁m + (1−β₁)·damping·g, here with the group's β₁ and a damping of 1. Others override one
    or both, in the language of techniques (docs/engine.md)."""

    def state(self) -> dict[str, Kind]:
        """What it keeps of a parameter, by name."""
        return {}

    def beta1(self, work: Work) -> Tensor:
        """The share of m that stays, per tensor."""
        return work.beta1

    def damping(self, work: Work) -> Tensor | float:
        """The factor on the gradient that enters m: a number, or one per tensor."""
        return 1.0


class Consistent(Momentum):
    """β₁ₜ = max(β₁·decayᵗ, 0.4): less momentum the longer training lasts.

    In the training of diffusion models gradients of late steps are consistent enough by themselves.

    Source: Xu et al., Towards Faster Training of Diffusion Models: An Inspiration of a Consistency
    Phenomenon, arXiv 2404.07946; the numbers are those of spec 1 §5.

    Args:
        decay: the `beta1_decay` of the optimizer.
    """

    LEAST = 0.4

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def beta1(self, work: Work) -> Tensor:
        return (work.beta1 * self.decay**work.step).clamp_min(self.LEAST)


class TorqueAware(Momentum):
    """ŝ ← β·ŝ + (1−β)·cos(m, g); the gradient entering m is multiplied by (1+ŝ)/2 + ε.

    The cosine is over the whole tensor, of m before this step and g as the techniques before have
    made it; 0 while either is 0. ŝ starts at 0.

    Source: Malviya et al., Torque-Aware Momentum, arXiv 2412.18790, eq. 3 to 5.

    Args:
        beta: β, the `tam_beta` of the optimizer.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def state(self) -> dict[str, Kind]:
        return {"tam_alignment": "scalar"}

    def damping(self, work: Work) -> Tensor:
        m, g = work.state["exp_avg"], work.g
        mg, mm, gg = work.sum(m * g), work.sum(m * m), work.sum(g * g)
        cosine = mg / (mm.sqrt() * gg.sqrt()).clamp_min(TINY)
        smooth = self.beta * work.state["tam_alignment"] + (1 - self.beta) * cosine
        work.state["tam_alignment"] = smooth
        work.report["tam/alignment"] = smooth
        return (1 + smooth) / 2 + work.eps
