"""Dynamic weight decay, and the step itself with its decoupled decay."""

from __future__ import annotations

from typing import Literal

from .base import Technique, Work


class DynamicWeightDecay(Technique):
    """Multiplies `weight_decay` by a factor that falls with the steps, by the parameter's family.

    1 up to T steps. After, with q = (step − T)/T: LoRA max(μ, f^min(q, 2)),
    LoKr max(1.5μ, (f^0.7)^min(q, 1.5)), all others 1 (spec 1 §3).

    Args:
        transition_steps: T.
        factor: f.
        min_ratio: μ.
        others: the family by whose rule all others go; None leaves them as they are.
    """

    def __init__(
        self,
        transition_steps: int,
        factor: float,
        min_ratio: float,
        others: Literal["lora", "lokr"] | None = None,
    ) -> None:
        self.transition_steps = transition_steps
        self.factor = factor
        self.min_ratio = min_ratio
        self.others = others

    def schedule(self, family: str, step: int) -> float:
        if family == "other" and self.others is not None:
            family = self.others
        if family == "other" or step <= self.transition_steps:
            return 1.0
        q = (step - self.transition_steps) / self.transition_steps
        if family == "lora":
            return max(self.min_ratio, self.factor ** min(q, 2.0))
        return max(1.5 * self.min_ratio, (self.factor**0.7) ** min(q, 1.5))

    def apply(self, work: Work) -> None:
        work.weight_decay = work.weight_decay * work.factors[self]


class Descent(Technique):
    """p' = p·(1 − lr·weight_decay) − lr·pace·length·u, lr being the scheduler's.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    """

    def apply(self, work: Work) -> None:
        effective_lr = work.lr * work.pace
        work.rate = effective_lr * work.length
        work.decay = 1 - work.lr * work.weight_decay
        work.new_p = work.spread(work.decay) * work.p - work.spread(work.rate) * work.u
        work.report["effective_lr"] = effective_lr * work.inner_pace
        work.report.setdefault("weight_decay", work.weight_decay)
