"""ALLoRA's row scaling: rows that have grown move less."""

from __future__ import annotations

from .base import Technique, Work


class RowScale(Technique):
    """u ← u/√(‖row‖ + 1/η²), row by row of p before the step; a row of a weight of more than two
    axes has all that belongs to one index of the first (out × rest), of a vector each element is
    one. A row of zeros moves at η times the rate.

    Source: Huang and Balestriero, ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws,
    arXiv 2410.09692.

    Args:
        eta: η.
    """

    def __init__(self, eta: float) -> None:
        self.eta = eta

    def apply(self, work: Work) -> None:
        norm = work.line_sum(work.p * work.p, "filter").sqrt()
        scale = (norm + 1 / self.eta**2).rsqrt()
        work.u = work.u * work.spread_lines(scale, "filter")
