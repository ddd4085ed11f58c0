"""Grams: direction from the gradient, magnitude from the momentum."""

from __future__ import annotations

import torch

from .base import Technique, Work


class Grams(Technique):
    """u ← |u|·sign(g).

    Source: Cao et al., Grams: Gradient Descent with Adaptive Momentum Scaling, arXiv 2412.17107,
    definition 3.
    """

    def apply(self, work: Work) -> None:
        work.u = torch.where(work.g == 0, 0.0, torch.copysign(work.u, work.g))
