"""Cautious updates: no step where momentum and gradient disagree."""

from __future__ import annotations

from .base import Technique, Work


class Cautious(Technique):
    """u ← u·[u·g > 0]·n/(Σ[u·g > 0] + 1), n and the sum over the tensor.

    After Grams, u has g's sign everywhere and nothing is masked.

    Source: Liang et al., Cautious Optimizers: Improving Training with One Line of Code,
    arXiv 2411.16085, algorithm 1.
    """

    def apply(self, work: Work) -> None:
        mask = (work.u * work.g > 0).to(work.u.dtype)
        (kept,) = work.sum(mask)
        work.u = work.u * mask * work.spread(work.layout.numel / (kept + 1))
        work.report["cautious/masked_share"] = 1 - kept / work.layout.numel
