"""Grams: direction from the gradient, magnitude from the momentum."""

from __future__ import annotations

from .base import Technique, Work


class Grams(Technique):
    """u ← |u|·sign(g).

    Source: Cao et al., Grams: Gradient Descent with Adaptive Momentum Scaling, arXiv 2412.17107,
    definition 3.
    """

    def apply(self, work: Work) -> None:
        work.u = work.u.abs() * work.g.sign()
