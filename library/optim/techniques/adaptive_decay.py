"""Adaptive weight decay: more where the gradient is large."""

from __future__ import annotations

import torch

from .base import TINY, Technique, Work


class AdaptiveDecay(Technique):
    """Weight decay is multiplied, element by element, by θ = 2/(1 + e^(−z)), z being |g|
    standardised over the tensor: (|g| − mean|g|)/std|g|, 0 where all are equal.

    θ lies between 0 and 2 and is about 1 on average. The decay, p·lr·weight_decay·θ, joins the
    step: it goes into u, and `Descent` has none left to do. g is the gradient itself.

    Source: Nakamura and Hong, Adaptive Weight Decay for Deep Neural Networks, arXiv 1907.08931
    (AdaDecay), with α = 1.
    """

    def apply(self, work: Work) -> None:
        magnitude = work.grad.abs()
        mean = work.sum(magnitude) / work.numel
        square = work.sum(work.grad * work.grad) / work.numel
        variance = (square - mean * mean).clamp_min(0.0)
        # Of equal numbers the variance is what rounding has left of it.
        even = variance <= _ROUNDING * square
        inverse = torch.where(even, 0.0, variance.clamp_min(TINY).rsqrt())
        z = (magnitude - work.spread(mean)) * work.spread(inverse)
        share = 2 * work.weight_decay / (work.pace * work.length)
        work.u = work.u + work.spread(share) * (z.sigmoid() * work.p)
        work.report["weight_decay"] = work.weight_decay
        work.weight_decay = 0.0 * work.weight_decay


_ROUNDING = 1e-6
