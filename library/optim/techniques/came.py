"""CAME: second moments from rows and columns, and confidence in the momentum from them too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..state import Kind
from .base import TINY, Technique, Work
from .tam import Momentum


def is_factored(shape: torch.Size) -> bool:
    """Whether rows and columns stand for a tensor's elements: of vectors, and of matrices of a
    single row or column, they would be the elements themselves."""
    return len(shape) > 1 and shape[-1] > 1 and shape[-2] > 1


class FactoredAverage:
    """A moving average of a positive matrix x, as x̄ᵢⱼ ≈ rᵢ·cⱼ/mean(r), with r and c the moving
    averages of the means of x + ε over its rows and columns.

    A weight of more than two axes is a stack of such matrices over its last two. Where the shape
    is not `is_factored` the average of each element itself is kept, which is the same.

    Source: Shazeer and Stern, Adafactor, arXiv 1804.04235, algorithm 4.

    Args:
        name: of the state.
    """

    def __init__(self, name: str) -> None:
        self.name, self.row, self.column = name, f"{name}_row", f"{name}_col"

    def state(self, shape: torch.Size) -> dict[str, Kind]:
        if is_factored(shape):
            return {self.row: "row", self.column: "column"}
        return {self.name: "positive"}

    def inverse_root(self, work: Work, x: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
        """Take x into the average; 1/√ of the average of each element."""
        if self.name in work.state:
            average = work.spread(beta) * work.state[self.name]
            average = average + work.spread(1 - beta) * (x + work.spread(eps))
            work.state[self.name] = average
            return average.clamp_min(TINY).rsqrt()
        rows, columns = work.line_mean(x, "row"), work.line_mean(x, "column")
        old, new, floor = (work.to_lines(number, "row") for number in (beta, 1 - beta, eps))
        row = old * work.state[self.row] + new * (rows + floor)
        old, new, floor = (work.to_lines(number, "column") for number in (beta, 1 - beta, eps))
        column = old * work.state[self.column] + new * (columns + floor)
        work.state |= {self.row: row, self.column: column}
        by_row = (row / work.mean_of_rows(row).clamp_min(TINY)).clamp_min(TINY).rsqrt()
        by_column = column.clamp_min(TINY).rsqrt()
        return work.spread_lines(by_row, "row") * work.spread_lines(by_column, "column")


class CAME(Technique):
    """v ← β₂v + (1−β₂)(g² + ε₁), û = g/√v, û ← û/max(1, RMS(û)/d), m ← β₁m + (1−β₁)û, u = m;
    v is a `FactoredAverage`, RMS is over the tensor. `Confidence` makes the rest of the method.

    Source: Luo et al., CAME: Confidence-guided Adaptive Memory Efficient Optimization,
    arXiv 2307.02047, algorithm 2.

    Args:
        momentum: decides how much of û enters m.
        clip_threshold: d.
    """

    def __init__(self, momentum: Momentum, clip_threshold: float) -> None:
        self.momentum = momentum
        self.clip_threshold = clip_threshold
        self.average = FactoredAverage("exp_avg_sq")

    def state(self, role: str, entry: Mapping[str, Any], shape: torch.Size) -> dict[str, Kind]:
        own: dict[str, Kind] = {"exp_avg": "signed"}
        return {**own, **self.average.state(shape), **self.momentum.state()}

    def apply(self, work: Work) -> None:
        g = work.g
        # Before m moves: torque is measured against the momentum of the step before.
        damping, beta1 = self.momentum.damping(work), self.momentum.beta1(work)
        normalised = g * self.average.inverse_root(work, g * g, work.beta2, work.eps_square)
        rms = (work.sum(normalised * normalised) / work.numel).sqrt()
        clip = 1 / (rms / self.clip_threshold).clamp_min(1.0)
        work.normalised = normalised * work.spread(clip)
        entering = work.spread((1 - beta1) * damping)
        work.u = work.spread(beta1) * work.state["exp_avg"] + entering * work.normalised
        work.state["exp_avg"] = work.u


class Confidence(Technique):
    """s ← β₃s + (1−β₃)((û − m)² + ε₂), u ← u/√s: less of the momentum where updates have departed
    from it.

    s is a `FactoredAverage`; vectors have none and keep u. The divisor is positive, so that what
    asks for the direction of u may stand before or behind it.

    Source: as for `CAME`.
    """

    def __init__(self) -> None:
        self.average = FactoredAverage("exp_avg_res")

    def state(self, role: str, entry: Mapping[str, Any], shape: torch.Size) -> dict[str, Kind]:
        return self.average.state(shape) if len(shape) > 1 else {}

    def apply(self, work: Work) -> None:
        average = self.average
        if not {average.name, average.row} & work.state.keys():
            return
        apart = work.normalised - work.state["exp_avg"]
        inverse = average.inverse_root(work, apart * apart, work.beta3, work.eps_residual)
        work.u = work.u * inverse
