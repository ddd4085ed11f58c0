"""What `lr_mask` does to an update, and what is reported of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from lr_masks import FROM_ZERO, ONLY_MASK, WIDE, Limits, MaskReference, gradients
from optimizers import drawn, each_backend, parameters
from torch import Tensor

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.telemetry import optimizer_report

SHAPES = [(), (1,), (7,), (16, 24), (6, 5, 3, 3), (257,)]
BETAS, EPS, DECAY, STEPS = (0.9, 0.99), 1e-8, 0.05, 60
SECOND_GROUP = 0.3  # of the first group's lr
ROUNDING = 2.0**-24  # of float32


class AdamW:
    """AdamW of one tensor in float64, each element's update times a factor.

    Attributes:
        rounded: of each element, the sum of all numbers that a program in float32 rounds.
    """

    def __init__(self, start: Tensor) -> None:
        self.p = start.double()
        self.m, self.v = torch.zeros_like(self.p), torch.zeros_like(self.p)
        self.rounded = torch.zeros_like(self.p)
        self.step = 0

    def advance(self, grad: Tensor, lr: float, factor: Tensor) -> None:
        g, (beta1, beta2) = grad.double(), BETAS
        self.step += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        root = (self.v / (1 - beta2**self.step)).sqrt() + EPS
        update = self.m / (1 - beta1**self.step) / root
        self.p = self.p * (1 - lr * DECAY) - lr * factor * update
        # Momentum is rounded as what enters it, and the mask as a number of lr's size.
        self.rounded += self.p.abs() + lr * (factor * (1 + update.abs()) + update.abs())


class Run:
    """An optimizer with the mask and hardly anything else, beside its reference.

    The second half of several tensors is a group with another lr, and all tensors but the first
    miss their gradient at times.

    Args:
        pace: another factor on lr: importance, which for a single tensor is `adaptation_strength`.
    """

    def __init__(
        self,
        backend: str,
        limits: Limits,
        warmup_steps: int,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        pace: float | None = None,
    ) -> None:
        self.shapes, self.pace = shapes, 1.0 if pace is None else pace
        start = [0.01 * tensor for tensor in drawn(*shapes)]
        self.params = parameters(*start)
        adaptation = {} if pace is None else {"adaptation_strength": pace}
        self.optimizer = AdaptiveHinaAdamW(
            self.params[: len(shapes) // 2] or self.params,
            betas=BETAS,
            eps=EPS,
            weight_decay=DECAY,
            backend=backend,
            warmup_steps=warmup_steps,
            **limits._asdict(),
            **{**ONLY_MASK, "use_dynamic_adaptation": pace is not None, **adaptation},
        )
        if len(shapes) > 1:
            self.optimizer.add_param_group({"params": self.params[len(shapes) // 2 :]})
        self.masks = [MaskReference(limits, warmup_steps) for _ in start]
        self.references = list(map(AdamW, start))

    def advance(self, step: int, lr: float) -> tuple[list[Tensor], list[float]]:
        """One step of both; of the tensors that took part, factors and lr."""
        lrs = [lr, *[lr * SECOND_GROUP] * (len(self.optimizer.param_groups) - 1)]
        for group, own in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = own
        factors, rates = [], []
        for i, grad in enumerate(gradients(*self.shapes, step=step)):
            missing = i > 0 and (step + 2 * i) % 7 == 0
            self.params[i].grad = None if missing else grad
            if missing:
                continue
            own = lrs[2 * i // len(self.shapes)]
            self.masks[i].advance(grad, own)
            factors.append(self.masks[i].factor(own, self.pace) if own else torch.ones_like(grad))
            rates.append(own)
            self.references[i].advance(grad, own, factors[-1])
        self.optimizer.step()
        return factors, rates

    def error(self) -> float:
        """The largest difference, as a share of all that was rounded."""
        return max(
            float(((p.detach().double() - r.p).abs() / r.rounded).max())
            for p, r in zip(self.params, self.references, strict=True)
        )


def rise_and_fall(step: int) -> float:
    """To 2e-3 in ten steps, from zero, and down to nearly nothing."""
    return 2e-3 * (step / 10 if step < 10 else 0.5 * (1 + math.cos(math.pi * (step - 10) / 50)))


CASES: dict[str, tuple[int, Callable[[int], float]]] = {
    "rise and fall": (30, rise_and_fall),
    "never frozen": (100, rise_and_fall),
    "frozen at once": (0, lambda step: rise_and_fall(step + 4)),
    "frozen in the first step": (1, lambda step: rise_and_fall(step + 4)),
    "frozen in the second step": (2, lambda step: rise_and_fall(step + 4)),
    "above max_lr": (30, lambda step: 0.04 - 0.0005 * step),
    "rising beyond max_lr": (40, lambda step: 1e-3 * (step + 1)),
    "below min_lr": (30, lambda step: 5e-5 * (1 + math.sin(step / 5))),
    "rising from below min_lr": (40, lambda step: 1e-5 * (step + 1)),
    "zero at times": (30, lambda step: 0.0 if step in (0, 1, 5, 40) else 1e-4),
}


@each_backend
@pytest.mark.parametrize(("warmup_steps", "schedule"), CASES.values(), ids=list(CASES))
def test_updates_are_multiplied_by_the_masks(backend, warmup_steps, schedule):
    run = Run(backend, WIDE, warmup_steps)
    for step in range(STEPS):
        factors, rates = run.advance(step, schedule(step))
        if rates[0]:
            check_report(run.optimizer, factors, rates)
    assert run.error() < ROUNDING


def check_report(
    optimizer: AdaptiveHinaAdamW,
    factors: Sequence[Tensor],
    rates: Sequence[float],
    pace: float = 1.0,
) -> None:
    """The report has the means over the tensors' elements, whatever lies behind their ends. (That
    is taken off a sum over whole blocks: of a single element's factor it leaves four digits.)"""
    means = [float(factor.double().mean()) for factor in factors]
    effective = [rate * mean for rate, mean in zip(rates, means, strict=True)]
    report = optimizer_report(optimizer)
    assert report["lr_mask/factor"] == pytest.approx(sum(means) / len(means) / pace, rel=1e-4)
    assert report["effective_lr/regular"] == pytest.approx(
        sum(effective) / len(effective), rel=1e-4
    )


PACES = [0.2, 3.0]


@each_backend
@pytest.mark.parametrize("pace", PACES)
def test_mask_and_pace_together_are_limited(backend, pace):
    run = Run(backend, FROM_ZERO, 30, [(16, 25)], pace)
    limited = {"below": 0, "above": 0}
    for step in range(STEPS):
        # At first it is zero, and so are the masks; at the end masks are far above it.
        lr = 5e-5 * min(step // 3, 3) * (0.9 ** max(step - 25, 0))
        factors, rates = run.advance(step, lr)
        if lr:
            check_report(run.optimizer, factors, rates, pace)
            limited["below"] += int((factors[0] == 0.001).sum())
            limited["above"] += int((factors[0] == 10).sum())
    assert run.error() < ROUNDING
    assert limited["below"] > 100
    assert limited["above"] > 100 or pace < 1


@each_backend
@pytest.mark.parametrize(("limits", "pace"), [(WIDE, None), (FROM_ZERO, 3.0)])
def test_a_learning_rate_of_zero_moves_nothing(backend, limits, pace):
    run = Run(backend, limits, 20, [(16, 25)], pace)
    (p,) = run.params
    for step in range(30):
        before = p.detach().clone()
        stops = step in (0, 1, 8, 18, 19, 20, 25)
        run.advance(step, 0.0 if stops else 1e-4)
        assert torch.equal(p, before) == stops, step
        assert bool(p.isfinite().all())
        if stops:
            assert optimizer_report(run.optimizer)["effective_lr/regular"] == 0
    assert run.error() < ROUNDING


def test_after_the_warmup_the_whole_tensor_falls_with_lr():
    run = Run("eager", WIDE, 20, [(8, 9)])
    for step in range(20):
        run.advance(step, 2e-3)
    mask = run.optimizer.masks(run.params[0])
    for step, lr in enumerate((1e-3, 2e-4, 2e-5, 2e-3, 4e-3), start=20):
        run.advance(step, lr)
        report = optimizer_report(run.optimizer)
        share = {1e-3: 0.5, 2e-4: 0.1, 2e-5: 0.1, 2e-3: 1.0, 4e-3: 1.0}[lr]
        expected = (mask * share).clamp(max=10 * lr).mean()
        assert report["effective_lr/regular"] == pytest.approx(float(expected), rel=1e-4)
        assert torch.equal(run.optimizer.masks(run.params[0]), mask)
