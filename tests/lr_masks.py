"""What the tests of `lr_mask` share: its definition written once more, and gradients to move it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from optimizers import drawn
from torch import Tensor

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.techniques.base import TINY

ONLY_MASK: dict[str, Any] = {
    **dict.fromkeys(AdaptiveHinaAdamW.SWITCHES, False),
    "use_lr_mask": True,
    "optim_bits": 32,
}


class Limits(NamedTuple):
    """How far a mask moves in a step, and between what."""

    lr_bump: float
    min_lr: float
    max_lr: float


# Few, because each is another program to compile.
DEFAULT = Limits(3e-6, 1e-7, 1e-3)
WIDE = Limits(1e-5, 1e-4, 2e-2)
FROM_ZERO = Limits(1e-5, 0.0, 2e-2)


class MaskReference:
    """The mask of one tensor by its definition (spec 1 §4, `LRMask`), in float64.

    An element's mask is clamp(L + k·bump, low, high), L being the highest lr so far. Until the
    freeze k moves by one where the gradient has kept its sign (+) or turned it (−); where the mask
    has reached a limit k goes no further. What lacks a millionth of a bump counts as reached, and
    an lr of zero as the smallest number of float32.
    """

    def __init__(self, limits: Limits, warmup_steps: int) -> None:
        self.limits, self.warmup_steps = limits, warmup_steps
        self.step, self.highest, self.start = 0, TINY, TINY

    @property
    def frozen(self) -> bool:
        """Whether the last step left the mask as it was."""
        return self.step >= self.warmup_steps and self.step > 1

    def advance(self, grad: Tensor, lr: float) -> None:
        self.step += 1
        self.highest = max(self.highest, lr)
        if self.step == 1:
            self.k = torch.zeros(grad.shape, dtype=torch.int64)
            self.last = torch.zeros(grad.shape, dtype=torch.int64)
        if self.frozen:
            return
        self.start = self.highest
        sign = (grad > 0).long() - (grad < 0).long()
        self.k = self.k + sign * self.last
        self.last = torch.where(sign == 0, self.last, sign)
        bump, low, high = self.limits
        while (beyond := self._at(self.k - 1) >= high - 1e-6 * bump).any():
            self.k = torch.where(beyond, self.k - 1, self.k)
        while (beyond := self._at(self.k + 1) <= low + 1e-6 * bump).any():
            self.k = torch.where(beyond, self.k + 1, self.k)

    def _at(self, k: Tensor) -> Tensor:
        return self.start + k.double() * self.limits.lr_bump

    @property
    def mask(self) -> Tensor:
        return self._at(self.k).clamp(self.limits.min_lr, self.limits.max_lr)

    def factor(self, lr: float, pace: float = 1.0) -> Tensor:
        """What each element's update is multiplied by, at an lr that is not zero."""
        share = max(lr / self.highest, 0.1) if self.frozen else 1.0
        return (self.mask * share / lr * pace).clamp(0.001, 10)


class LiteralMask:
    """The mask as spec 1 §4 words it, in floats: mask ← clamp(mask ± bump + rise of lr)."""

    def __init__(self, limits: Limits, warmup_steps: int) -> None:
        self.limits, self.warmup_steps, self.step = limits, warmup_steps, 0

    def advance(self, grad: Tensor, lr: float) -> None:
        bump, low, high = self.limits
        self.step += 1
        sign = grad.double().sign()
        if self.step == 1:
            self.mask = torch.full(grad.shape, lr, dtype=torch.float64).clamp(low, high)
            self.last, self.highest = sign, lr
        elif self.step < self.warmup_steps:
            rise = max(lr - self.highest, 0.0)
            self.mask = (self.mask + bump * sign * self.last + rise).clamp(low, high)
            self.last = torch.where(sign == 0, self.last, sign)
            self.highest = max(self.highest, lr)


def gradients(*shapes: tuple[int, ...], step: int) -> list[Tensor]:
    """Gradients by five kinds of elements in turn: the sign stays; turns at each step; is drawn;
    stays for some steps; stays, with zeros between. Their sizes differ by many orders."""
    own, noise, size = (drawn(*shapes, seed=seed) for seed in (1, 2 * step + 2, 2 * step + 3))
    grads = []
    for i, shape in enumerate(shapes):
        kind = ((torch.arange(own[i].numel()) + i) % 5).view(shape)
        turns = own[i] * (-1) ** step
        drifts = (own[i] * step / 7).cos()
        pauses = torch.where(noise[i] > 0.5, 0.0, own[i])
        sign = own[i]
        for number, other in enumerate((turns, noise[i], drifts, pauses), start=1):
            sign = torch.where(kind == number, other, sign)
        grads.append(sign.sign() * 10.0 ** (2 * size[i]))
    return grads
