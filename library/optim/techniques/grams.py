"""Grams: direction from the gradient, magnitude from the momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Technique, Work


class Grams(Technique):
    """u ← |u|·sign(g).

    Source: Cao et al., Grams: Gradient Descent with Adaptive Momentum Scaling, arXiv 2412.17107,
    definition 3.
    """

    def apply(self, work: Work) -> None:
        work.u = with_sign_of(work.u, work.g)


class FadingGrams(Technique):
    """u ← (1−w)·u + w·|u|·sign(g), w = decayᵗ: Grams that gives way to the momentum's direction.

    Source: as for `Grams`; the weight is spec 1 §5's.

    Args:
        decay: the `beta1_decay` of the optimizer.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def apply(self, work: Work) -> None:
        weight = self.decay**work.step
        own, turned = work.spread(1 - weight), work.spread(weight)
        work.u = own * work.u + turned * with_sign_of(work.u, work.g)


def with_sign_of(u: Tensor, g: Tensor) -> Tensor:
    """|u|·sign(g)."""
    return torch.where(g == 0, 0.0, torch.copysign(u, g))
