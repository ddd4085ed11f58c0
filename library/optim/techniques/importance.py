"""Importance: who contributes more gets more of the learning rate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..overview import Overview
from .base import INNER_PACE, Technique, Work

LEAST, MOST = 0.1, 3.0
"""The limits of the factor on lr (spec 1 §4)."""

_WEIGHTS = (0.4, 0.3, 0.3)  # of gradient, change and intrinsic
_WINDOW = 0.9  # the last norms of the gradient count by this power: ten of them, roughly
_LEAST_CONSISTENCY = 0.1
_NOTHING = 1e-6  # an entry below is none
_SOMETHING = 1e-100  # an importance below counts as this one: its inverse is a number


class Importance(Technique):
    """Multiplies lr by a parameter's importance, of which the mean over all parameters is 1.

    After each step, for the parameters that took part:

    - gradient = ‖g‖·max(1 − std/mean of its last norms, 0.1)
    - change = |‖p‖ − ‖p₀‖|/max(‖p‖, ‖p₀‖): at most 1, also for the half of a LoRA that starts at 0
    - intrinsic = variance of p × share of its entries of at least 1e-6

    each divided by its mean over the parameters, and
    importance ← decay·importance + (1−decay)·(0.4·gradient + 0.3·change + 0.3·intrinsic).

    The factor is clamp(c·importance·strength, 0.1, 3), where c makes up for what the limits take
    away or add: the mean of the factor, over the parameters that take part, is `strength` itself.
    Parameters count by the mean of what lr is multiplied with within them (`Work.inner_pace`, of
    the step before), else a mask that is low where importance is high would lower the whole.
    So lr is redistributed, never shrunk as a whole. A parameter has the importance 1 until its
    first step is over. The last norms are weighted by powers of 0.9.

    Source: spec 1 §4. That ‖g‖ and change tell who matters is common in pruning and in AdaLoRA,
    arXiv 2303.10512, eq. 8 to 11.

    Args:
        decay: `importance_decay`.
        strength: `adaptation_strength`.
    """

    def __init__(self, decay: float, strength: float) -> None:
        self.decay = decay
        self.strength = strength

    def prepare(self, overview: Overview) -> Tensor | None:
        importance, inner = importances(overview), overview.numbers("inner_pace", 1.0)
        active = [param.grad is not None and param.numel() > 0 for param in overview.params]
        factors = torch.ones_like(importance)
        if any(active):
            factors[active] = fair_factors(importance[active], self.strength, inner[active])
        return factors

    def apply(self, work: Work) -> None:
        work.pace = work.pace * work.factors[self]
        mean = work.sum(work.p) / work.numel
        square = work.sum(work.p * work.p)
        share = work.sum(torch.where(work.p.abs() >= _NOTHING, 1.0, 0.0)) / work.numel
        variance = (square / work.numel - mean * mean).clamp_min(0.0)
        work.report["importance/gradient_norm"] = work.sum(work.grad * work.grad).sqrt()
        work.report["importance/parameter_norm"] = square.sqrt()
        work.report["importance/intrinsic"] = variance * share

    def conclude(self, overview: Overview) -> None:
        norm = overview.reported["importance/gradient_norm"]
        size = overview.reported["importance/parameter_norm"]
        # NaN where there was no gradient; infinite where its square was too large for float32.
        active = norm.isfinite() & size.isfinite()
        if not bool(active.any()):
            return
        start = overview.numbers("initial_norm", -1.0)
        start = torch.where((start < 0) & active, size, start)
        largest = torch.maximum(size, start)
        change = torch.where(largest > 0, (size - start).abs() / largest, 0.0)
        gradient = norm * self._consistency(overview, norm, active)
        scores = (gradient, change, overview.reported["importance/intrinsic"])
        raw = torch.zeros_like(norm)
        for weight, score in zip(_WEIGHTS, scores, strict=True):
            mean = score[active].mean()
            raw += weight * (score / mean if mean > 0 else torch.ones_like(score))
        before = overview.numbers("importance", 1.0)
        after = self.decay * before + (1 - self.decay) * raw
        overview.note("importance", torch.where(active, after, before))
        overview.note("initial_norm", start)
        if INNER_PACE in overview.reported:
            inner = overview.reported[INNER_PACE]
            before = overview.numbers("inner_pace", 1.0)
            overview.note("inner_pace", torch.where(active, inner, before))

    def _consistency(self, overview: Overview, norm: Tensor, active: Tensor) -> Tensor:
        """How steady the norms of a parameter's gradients are, and its memory of them."""
        weight = overview.numbers("norm_weight", 0.0)
        mean = overview.numbers("norm_mean", 0.0)
        square = overview.numbers("norm_square", 0.0)
        old = 1 - weight  # _WINDOW to the power of the steps so far
        weight = torch.where(active, 1 - _WINDOW * old, weight)
        mean = torch.where(active, _WINDOW * mean + (1 - _WINDOW) * norm, mean)
        square = torch.where(active, _WINDOW * square + (1 - _WINDOW) * norm * norm, square)
        for name, values in (("weight", weight), ("mean", mean), ("square", square)):
            overview.note(f"norm_{name}", values)
        seen = weight > 0
        average = torch.where(seen, mean / weight, 0.0)
        spread = torch.where(seen, square / weight - average * average, 0.0).clamp_min(0).sqrt()
        steady = torch.where(average > 0, 1 - spread / average, 1.0)
        return steady.clamp_min(_LEAST_CONSISTENCY)


def importances(overview: Overview) -> Tensor:
    """The importance of each parameter, float64 `[parameters]`: 1 on average, over those that have
    taken a step; 1 for the others."""
    importance = overview.numbers("importance", 1.0)
    begun = overview.begun
    return torch.where(begun, importance / importance[begun].mean(), 1.0)


def fair_factors(importance: Tensor, strength: float, weights: Tensor) -> Tensor:
    """clamp(c·importance·strength, 0.1, 3), c such that the weighted mean is `strength` (or the
    limit that is nearest to it).

    The mean grows with c in straight lines, with a corner wherever a parameter comes to one of the
    limits: between which two of these it is right is looked up.

    Args:
        importance, weights: float64 `[parameters]`, at least one; weights above 0.
    """
    importance, weights = importance.clamp_min(_SOMETHING), weights / weights.sum()

    def factors(c: float) -> Tensor:
        return (c * importance).clamp(LEAST, MOST)

    def mean(c: float) -> float:
        return float(factors(c) @ weights)

    wanted = min(max(strength, LEAST), MOST)
    corners = torch.cat([LEAST / importance, MOST / importance]).sort().values.tolist()
    low, high = 0, len(corners) - 1  # all parameters are at the lower limit, and at the upper one
    while high - low > 1:
        middle = (low + high) // 2
        if mean(corners[middle]) <= wanted:
            low = middle
        else:
            high = middle
    below, above = mean(corners[low]), mean(corners[high])
    share = (wanted - below) / (above - below) if above > below else 0.0
    return factors(corners[low] + share * (corners[high] - corners[low]))
