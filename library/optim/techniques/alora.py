"""Pair scaling: the learning rate of an adapter's halves by the size of their product."""

from __future__ import annotations

import torch
from torch import Tensor

from ..overview import Overview
from ..products import lokr_norms
from .base import Technique, Work

_LOKR_NORM = 0.3
_LOKR_RATIO = 0.6


class PairScale(Technique):
    """Scales lr of the tensors of each pair; tensors without a partner keep theirs.

    LoRA: both halves by 1/(1 + mean row norm of B·A), B also by `ratio`.
    LoKr: every `lokr_*` by 1/(1 + 0.3·‖w1‖·‖w2‖), where ‖w1‖·‖w2‖ = ‖w1 ⊗ w2‖ exactly, and the half
    that starts at zero (w2, or w2_b where w2 is factored) also by 0.6·`ratio`.

    Source: spec 1 §3, after Huang and Balestriero, ALLoRA, arXiv 2410.09692, and Hayou et al.,
    LoRA+, arXiv 2402.12354.

    Args:
        ratio: the `alora_ratio` of the optimizer.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    uses_pair_norm = True

    def prepare(self, overview: Overview) -> Tensor | None:
        roles = overview.roles
        if not roles.lora_pairs and not roles.lokr_pairs:
            return None
        factors = torch.ones(len(roles.role), dtype=torch.float64)
        factors[roles.lora_positions[:, 1]] = self.ratio
        if roles.lokr_pairs:
            scale = 1 / (1 + _LOKR_NORM * lokr_norms(roles.lokr_pairs).double())
            factors = factors.to(scale.device)
            factors[roles.lokr_members[:, 0]] = scale[roles.lokr_members[:, 1]]
            factors[roles.lokr_zeros] = scale * (_LOKR_RATIO * self.ratio)
        return factors

    def apply(self, work: Work) -> None:
        work.pace = work.pace * work.factors[self] / (1 + work.pair_norm)
