"""Orthogonal gradient: only the part of the gradient that turns the weights."""

from __future__ import annotations

import torch

from .base import TINY, Technique, Work

# Below this share of ‖g‖² what is left of g is rounding: it has no direction to be scaled up.
_ROUNDING = 1e-5


class OrthogonalGradient(Technique):
    """g⊥ = g − (⟨p,g⟩/⟨p,p⟩)·p, then g ← g⊥·‖g‖/‖g⊥‖, per tensor.

    Tensors with p = 0 keep g, and so do tensors of a single element, which have no direction
    orthogonal to themselves and could never change. A g within 0.2 degrees of p's direction is
    dropped: what is left of it is rounding.

    Source: Prieto et al., Grokking at the Edge of Numerical Stability, arXiv 2501.04697, ⊥Grad.
    """

    def apply(self, work: Work) -> None:
        p, g = work.p, work.g
        pg, pp, gg = work.sum(p * g), work.sum(p * p), work.sum(g * g)
        free = (pp == 0) | (work.numel == 1)
        along = torch.where(free, 0.0, pg / pp.clamp_min(TINY))
        turned = g - work.spread(along) * p
        # ‖g⊥‖² by Pythagoras: to sum it up would take another pass over the tensor.
        rest = gg - along * pg
        scale = torch.where(rest > _ROUNDING * gg, (gg / rest.clamp_min(TINY)).sqrt(), 0.0)
        work.g = turned * work.spread(torch.where(free, 1.0, scale))
