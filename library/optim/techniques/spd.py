"""Selective projection decay: pull back towards an anchor, only where the step leads away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..roles import family_of
from ..state import Kind
from .base import TINY, Technique, Work

Anchor = Literal["auto", "adapter", "zero", "initial"]

_ADAPTER_ROLES = {"w_norm", "b_norm", "lora_mid", "hada", "oft_blocks", "glora"}
_SCALES = {"dora_scale", "ia3"}


def anchor_for(role: str, anchor: Anchor) -> Literal["zero", "initial"]:
    """Where a role is pulled to. By itself: zero for what is added to a base model, and the initial
    value for anything else, a DoRA or IA3 scale included (these start at a weight's norm or at 1).
    `adapter`: zero also for what no name tells of, because all that is trained is an adapter's.
    """
    if anchor == "adapter":
        return "initial" if role in _SCALES else "zero"
    if anchor != "auto":
        return anchor
    return "zero" if family_of(role) != "other" or role in _ADAPTER_ROLES else "initial"


class SelectiveProjection(Technique):
    """After the step, for tensors with −⟨g, p−p₀⟩ < 0:
    r = clamp((‖p'−p₀‖ − ‖p−p₀‖)/‖p'−p₀‖, 0, 1), p' ← p' − λ·r·(p'−p₀).

    g is the gradient itself, not what other techniques have made of it: one that is orthogonal to p
    would leave nothing to decide by. The anchor p₀ is zero for adapters, as in the paper's own use
    with them, and costs no memory there.

    Source: Tian et al., Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models,
    arXiv 2411.01713, algorithm 1, and its published code for the norms.

    Args:
        strength: λ, the `spd_lambda` of the optimizer.
        anchor: `auto`, or one anchor for all roles.
    """

    def __init__(self, strength: float, anchor: Anchor) -> None:
        self.strength = strength
        self.anchor: Anchor = anchor

    def state(self, role: str, entry: Mapping[str, Any], shape: torch.Size) -> dict[str, Kind]:
        return {"spd_anchor": "initial"} if anchor_for(role, self.anchor) == "initial" else {}

    def apply(self, work: Work) -> None:
        origin = work.state.get("spd_anchor")
        before = work.p if origin is None else work.p - origin
        descent, bb = work.sum(work.grad * before), work.sum(before * before)
        # ‖p'−p₀‖² − ‖p−p₀‖² from the sums of its parts: the difference of the two norms would be
        # lost in their rounding. p' − p = −(fade·p + rate·u).
        fade, rate = 1 - work.decay, work.rate
        uu, pu = work.sum(work.u * work.u), work.sum(work.p * work.u)
        if origin is None:
            pp, bp, bu = bb, bb, pu
        else:
            pp = work.sum(work.p * work.p)
            bp, bu = work.sum(before * work.p), work.sum(before * work.u)
        moved = fade**2 * pp + 2 * fade * rate * pu + rate**2 * uu
        grown = moved - 2 * (fade * bp + rate * bu)
        after = (bb + grown).clamp_min(TINY).sqrt()
        ratio = (grown / (after * (after + bb.sqrt()))).clamp(0, 1)
        ratio = torch.where(descent > 0, ratio, 0.0)
        back = self.strength * ratio
        if origin is None:  # p' − back·p' is the same step with smaller factors
            work.decay, work.rate = work.decay * (1 - back), work.rate * (1 - back)
            work.new_p = work.spread(work.decay) * work.p - work.spread(work.rate) * work.u
        else:
            work.new_p = work.new_p - work.spread(back) * (work.new_p - origin)
        work.report["spd/projected_share"] = torch.where(ratio > 0, 1.0, 0.0)
