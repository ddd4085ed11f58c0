"""Adaptive gradient regularization."""

from __future__ import annotations

import torch

from .base import TINY, Technique, Work


class AGR(Technique):
    """g ← g·(1 − |g|/Σ|g|), the sum over the tensor.

    Near identity on large tensors, where no element holds a noticeable share of the sum. A tensor
    of a single element keeps g: its share is 1, and it could never change.

    Source: Jiang et al., Adaptive Gradient Regularization, arXiv 2407.16944, eq. 4 and 5.
    """

    def apply(self, work: Work) -> None:
        magnitude = work.g.abs()
        total = work.sum(magnitude)
        share = torch.where(work.numel == 1, 0.0, 1 / total.clamp_min(TINY))
        work.g = work.g - work.g * magnitude * work.spread(share)
