"""A learning rate for each element, moved by the signs of its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..layout import BLOCK, layout_of
from ..state import Kind, pack_high, unpack_high
from .base import INNER_PACE, TINY, Technique, Work

LEAST, MOST = 0.001, 10.0
"""The limits of the factor on lr of mask and adaptation together (spec 1 §4)."""

_AFTERWARDS = 0.1  # a frozen mask falls with the scheduler to this share of itself
_ROUNDING = 1e-6  # bumps; a limit that is a whole number of bumps away must not become one more
_LEAST_LR = 1e-30  # a lower one counts as this: its inverse is a float32
_SIGN_BITS = 2
_BYTE, _PACKED = 256, 1024


class LRMask(Technique):
    """While t < `warmup_steps`: mask ← clamp(mask ± bump), + where the gradient keeps its sign and
    − where it flips; where the scheduler raises lr above all it was before, the mask rises by as
    much. From t = `warmup_steps` on it is frozen and falls with lr: mask·max(lr/(highest lr), 0.1).
    u ← u·clamp(mask/lr·pace, 0.001, 10), element by element, where lr is the scheduler's.

    The mask starts at lr and moves in whole bumps, so that it is held exactly by one whole number k
    for each element: mask = clamp(L + k·bump, low, high), L being the highest lr so far. k ends
    where the mask first reaches a limit: it does not run on behind it, and one step in the other
    direction is seen at once. (Where L is not a whole number of bumps from the limit, that step is
    shorter than a bump; a millionth of a bump counts as none.) An element whose gradient is zero
    keeps mask and sign.

    The first step with a mask moves none, since there is no sign to compare with, and is never the
    frozen kind: a parameter whose state comes from elsewhere and is past `warmup_steps` gets lr as
    its mask, and keeps it.

    16 bits hold k and the last sign; frozen, k takes eight bits where a tensor's masks are less
    than 256 bumps apart, ten where they are less than 1024, else 16.

    Source: spec 1 §4. Signs as a reason to change an element's step are as old as Riedmiller and
    Braun, RPROP, 1993; bumps, limits and the end of the warm-up are those of the Automagic
    optimizers.

    Args:
        bump: the `lr_bump` of the optimizer.
        low, high: `min_lr` and `max_lr`.
        warmup_steps: from this step of a parameter on its mask is frozen.
    """

    MOST_BUMPS: ClassVar[int] = (1 << (15 - _SIGN_BITS)) - 1  # what a sign leaves of 16 bits

    def __init__(self, bump: float, low: float, high: float, warmup_steps: int) -> None:
        self.bump = bump
        self.low = low
        self.high = high
        self.warmup_steps = warmup_steps
        apart = self._bumps(2 * warmup_steps)
        byte = {"step": max(warmup_steps - 1, 1), "lr_mask": torch.empty(0, dtype=torch.uint8)}
        packed = {**byte, "lr_mask_high": torch.empty(0, dtype=torch.uint8)}
        whole = {**byte, "lr_mask": torch.empty(0, dtype=torch.int16)}
        forms = ((0, byte), (_BYTE, packed), (_PACKED, whole))
        self.settled = [form for least, form in forms if apart >= least]

    @property
    def fits(self) -> bool:
        """Whether 16 bits are enough for as far as a mask can move."""
        return self._bumps(self.warmup_steps) <= self.MOST_BUMPS

    def _bumps(self, walked: int) -> float:
        """How far apart masks can be that have moved away from each other so many times."""
        width = (self.high - self.low) / self.bump
        return min(width, walked + self.low / self.bump) + 2

    def state(self, role: str, entry: Mapping[str, Any], shape: torch.Size) -> dict[str, Kind]:
        if "lr_mask" not in entry:
            return {"lr_walk": "whole", "lr_top": "scalar"}
        kind: Kind = "whole"
        if entry["lr_mask"].dtype == torch.uint8:
            kind = "packed" if "lr_mask_high" in entry else "byte"
        own: dict[str, Kind] = {"lr_mask": kind, "lr_mask_base": "scalar"}
        return {**own, "lr_mask_least": "scalar", "lr_top": "scalar"}

    def settles(self, entry: Mapping[str, Any]) -> bool:
        due = "lr_walk" in entry and entry["step"] >= self.warmup_steps - 1
        return due and _begun(entry)

    def settle(self, entry: dict[str, Any]) -> None:
        """Freeze the mask: signs are dropped, and k is packed where it fits."""
        top = entry["lr_top"]
        walked = (entry.pop("lr_walk") >> _SIGN_BITS).to(torch.int32)
        least = walked.min()
        code = walked - least
        largest = int(code.max())
        if largest < _BYTE:
            entry["lr_mask"] = code.to(torch.uint8)
        elif largest < _PACKED:
            layout = layout_of((code.numel(),), code.device)
            matrix = layout.gather([code], torch.int32)
            entry["lr_mask"] = (code & 255).to(torch.uint8)
            entry["lr_mask_high"] = pack_high(matrix)
        else:
            entry["lr_mask"] = code.to(torch.int16)
        entry["lr_mask_base"] = top.clone()
        entry["lr_mask_least"] = least.double() + self._reach(top).offset

    def apply(self, work: Work) -> None:
        # Zero is what a mask has seen that has not had a step yet.
        top = torch.maximum(work.state["lr_top"], work.lr).clamp_min(TINY)
        frozen = "lr_mask" in work.state
        code, mask = self._frozen(work) if frozen else self._walk(work, top)
        work.state["lr_top"] = top
        gain = work.pace / work.lr.clamp_min(_LEAST_LR)
        if frozen:
            gain = gain * (work.lr / top).clamp_min(_AFTERWARDS)
        base, empty = mask
        # clamp(clamp(mask)·gain) as one: there are many elements, and one gain for all.
        start, bump, (low, high) = base * gain, self.bump * gain, self._limits(gain)
        factor = work.spread(start) + code * work.spread(bump)
        factor = torch.minimum(torch.maximum(factor, work.spread(low)), work.spread(high))
        work.u = work.u * factor
        others, work.pace = work.pace, 1.0
        # A sum has the zeros behind a tensor's end in it.
        behind = BLOCK * (work.numel / BLOCK).ceil() - work.numel
        nothing = torch.minimum(torch.maximum(start + empty * bump, low), high)
        total = work.sum(factor) - behind * nothing
        work.inner_pace = total / work.numel
        work.report[INNER_PACE] = work.inner_pace / others

    def _limits(self, gain: Tensor) -> tuple[Tensor, Tensor]:
        """What of the mask times its gain the limits leave, per tensor."""
        return (self.low * gain).clamp(LEAST, MOST), (self.high * gain).clamp(LEAST, MOST)

    def _frozen(self, work: Work) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        base = work.state["lr_mask_base"] + work.state["lr_mask_least"] * self.bump
        return work.state["lr_mask"].to(torch.float32), (base, 0.0 * base)

    def _walk(self, work: Work, top: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Move k by this step's signs; k, what it counts from, and k behind a tensor's end."""
        walk = work.state["lr_walk"]
        reach = self._reach(top)
        # What k counts from may have moved with the highest lr.
        moved = self._reach(work.state["lr_top"]).offset - reach.offset
        moved = torch.where(work.state["lr_top"] > 0, moved, 0.0)
        last = ((walk << 30) >> 30).to(torch.float32)
        sign = work.grad.sign()
        k = (walk >> _SIGN_BITS).to(torch.float32) + last * sign + work.spread(moved)
        k = torch.maximum(torch.minimum(k, work.spread(reach.highest)), work.spread(reach.lowest))
        kept = torch.where(sign == 0, last, sign).to(torch.int32)
        work.state["lr_walk"] = (k.to(torch.int32) << _SIGN_BITS) | (kept & 3)
        empty = torch.maximum(torch.minimum(moved, reach.highest), reach.lowest)
        return k, (top + reach.offset * self.bump, empty)

    def _reach(self, top: Tensor) -> _Reach:
        lowest = ((self.low - top) / self.bump + _ROUNDING).floor()
        highest = ((self.high - top) / self.bump - _ROUNDING).ceil()
        offset = torch.maximum(lowest, highest.clamp_max(0.0))
        return _Reach(offset, lowest - offset, highest - offset)

    def masks(self, entry: Mapping[str, Any]) -> Tensor | None:
        """The mask of each element, float64, not yet scaled down with the scheduler; None for a
        parameter without a step, or whose steps were without a mask."""
        held = self._held(entry)
        return None if held is None else self._masks(*held)

    def tally(self, entry: Mapping[str, Any], lr: float) -> tuple[Tensor, Tensor] | None:
        """What lr is multiplied with at this learning rate, adaptation aside: the factors that
        elements have, float64, and how many elements have each. None as for `masks`. At an lr of 0,
        where a schedule may end, they are those of the highest lr.

        Masks are counted as the whole numbers that hold them, which takes a twentieth of the time
        that it takes to compute all.
        """
        held = self._held(entry)
        if held is None:
            return None
        codes, *origin = held
        lr = lr or float(entry["lr_top"])
        least = codes.min()
        counts = torch.bincount((codes - least).flatten())
        (seen,) = counts.nonzero(as_tuple=True)
        mask = self._masks(seen + least, *origin)
        if "lr_mask" in entry:
            top = max(float(entry["lr_top"]), lr, TINY)
            mask = mask * max(lr / top, _AFTERWARDS)
        return (mask / max(lr, _LEAST_LR)).clamp(LEAST, MOST), counts[seen]

    def _held(self, entry: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Whole numbers for the elements, the bumps that zero stands for, and what these bumps
        count from."""
        if "lr_mask" in entry:
            code = entry["lr_mask"].to(torch.int32)
            if "lr_mask_high" in entry:
                layout = layout_of((code.numel(),), code.device)
                (high,) = layout.split(unpack_high(entry["lr_mask_high"]), [code.shape])
                code = code + (high << 8)
            return code, entry["lr_mask_least"], entry["lr_mask_base"]
        if "lr_walk" in entry and _begun(entry):
            base = entry["lr_top"]
            return entry["lr_walk"] >> _SIGN_BITS, self._reach(base).offset, base
        return None

    def _masks(self, codes: Tensor, first: Tensor, base: Tensor) -> Tensor:
        return (base + (codes.double() + first) * self.bump).clamp(self.low, self.high)


def _begun(entry: Mapping[str, Any]) -> bool:
    """Whether a mask has had a step."""
    return "lr_top" in entry and bool(entry["lr_top"] > 0)


class _Reach(NamedTuple):
    """Where k may be: it counts from `offset` bumps above the highest lr, which is 0 unless that lr
    itself lies outside of the limits.

    Args:
        lowest, highest: from there, where the mask first reaches a limit.
    """

    offset: Tensor
    lowest: Tensor
    highest: Tensor
