"""Cautious updates: no step where momentum and gradient disagree."""

from __future__ import annotations

import torch

from .base import Technique, Work


class Cautious(Technique):
    """u ← u·[u·g > 0]·n/(Σ[u·g > 0] + 1), n and the sum over the tensor.

    The factor n/(Σ + 1) is one number for the tensor and goes to u's length. After Grams, u has g's
    sign everywhere and nothing is masked.

    Source: Liang et al., Cautious Optimizers: Improving Training with One Line of Code,
    arXiv 2411.16085, algorithm 1.
    """

    def apply(self, work: Work) -> None:
        agrees = work.u * work.g > 0
        kept = work.sum(torch.where(agrees, 1.0, 0.0))
        work.u = torch.where(agrees, work.u, 0.0)
        work.length = work.length * work.numel / (kept + 1)
        work.report["cautious/masked_share"] = 1 - kept / work.numel
