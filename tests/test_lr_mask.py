"""`lr_mask` of each element, exactly as defined, at every step of a run."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lr_masks import DEFAULT, ONLY_MASK, WIDE, Limits, LiteralMask, MaskReference, gradients
from optimizers import drawn, each_backend, parameters
from torch import Tensor

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW

# A ragged last block, convolutions, and at the end one that is large enough for 8-bit moments.
SHAPES = [(), (1,), (7,), (16, 24), (6, 5, 3, 3), (300,), (61, 70)]
PEAK, RISING, STEPS, WARMUP = 4e-4, 100, 600, 500


def warmup_then_cosine(step: int) -> float:
    if step < RISING:
        return (step + 1) / RISING
    return 0.5 * (1 + math.cos(math.pi * (step - RISING) / (STEPS - RISING)))


@pytest.mark.parametrize(
    ("backend", "options"), [("compiled", {}), ("eager", {**ONLY_MASK, "optim_bits": 8})]
)
def test_masks_equal_their_definition_at_every_step(backend, options):
    start = drawn(*SHAPES)
    start[4] = start[4].to(memory_format=torch.channels_last)
    start[6] = start[6].T
    params = parameters(*start)
    shapes = [tuple(p.shape) for p in params]
    optimizer = AdaptiveHinaAdamW(params, lr=PEAK, backend=backend, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine)
    references = [MaskReference(DEFAULT, WARMUP) for _ in params]
    assert all(optimizer.masks(p) is None for p in params)
    for step in range(1, STEPS + 1):
        lr = optimizer.param_groups[0]["lr"]
        for p, grad, reference in zip(
            params, gradients(*shapes, step=step), references, strict=True
        ):
            p.grad = grad
            reference.advance(grad, lr)
        optimizer.step()
        scheduler.step()
        for p, reference in zip(params, references, strict=True):
            assert torch.equal(optimizer.masks(p), reference.mask), (step, tuple(p.shape))
            assert ("lr_walk" in optimizer.state[p]) == (step < WARMUP)
    assert optimizer.state[params[-1]]["exp_avg"].dtype == torch.int8
    last = references[-1].mask
    assert last.min() == DEFAULT.min_lr
    assert last.max() == DEFAULT.max_lr
    assert len(last.unique()) > 50


def follow_masks(
    backend: str, limits: Limits, warmup_steps: int, lrs: list[float], **options
) -> tuple[list[Tensor], list[Tensor]]:
    """Train two tensors, hold their masks against the definition in each step; ours and the
    literal ones of all steps."""
    shapes = [(), (30,)]
    params = parameters(*drawn(*shapes))
    optimizer = AdaptiveHinaAdamW(
        params,
        backend=backend,
        warmup_steps=warmup_steps,
        **limits._asdict(),
        **ONLY_MASK,
        **options,
    )
    exact = [MaskReference(limits, warmup_steps) for _ in params]
    literal = [LiteralMask(limits, warmup_steps) for _ in params]
    ours, theirs = [], []
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        for p, grad in zip(params, gradients(*shapes, step=step), strict=True):
            p.grad = grad
        optimizer.step()
        for p, reference, other in zip(params, exact, literal, strict=True):
            reference.advance(p.grad, lr)
            other.advance(p.grad, lr)
            mask = optimizer.masks(p)
            assert torch.equal(mask, reference.mask), step
            ours.append(mask)
            theirs.append(other.mask)
    return ours, theirs


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


# What a limit, or lr, may be away from another: whole bumps, and not.
bumps = st.one_of(st.integers(0, 12).map(float), st.floats(0, 12), st.just(100.0))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    bump=st.sampled_from([3e-6, 7e-5, 0.01]),
    low=bumps,
    between=bumps,
    warmup_steps=st.sampled_from([0, 1, 2, 3, 12, 100]),
    lrs=st.lists(bumps, min_size=25, max_size=25),
    rising=st.booleans(),
)
def test_whatever_limits_and_lr_are(bump, low, between, warmup_steps, lrs, rising):
    limits = Limits(bump, low * bump, (low + between) * bump + 1e-9)
    lrs = [lr * bump for lr in (sorted(lrs) if rising else lrs)]
    ours, theirs = follow_masks("eager", limits, warmup_steps, lrs)
    # The mask in floats leaves the lattice of bumps at a limit that is not on it.
    assert apart(ours, theirs) <= bump * (1 + 1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    warmup_steps=st.sampled_from([0, 1, 2, 3, 12, 100]),
    lrs=st.lists(st.one_of(bumps, st.floats(1990, 2010)), min_size=25, max_size=25),
    rising=st.booleans(),
)
def test_whatever_lr_is_in_machine_code(warmup_steps, lrs, rising):
    lrs = [lr * WIDE.lr_bump for lr in (sorted(lrs) if rising else lrs)]
    ours, theirs = follow_masks("compiled", WIDE, warmup_steps, lrs)
    assert apart(ours, theirs) <= WIDE.lr_bump * (1 + 1e-6)


def test_in_whole_bumps_it_is_the_literal_mask():
    limits = Limits(1e-5, 2e-5, 4e-4)
    rise = [min(2 + 3 * step, 20) * 1e-5 for step in range(100)]
    ours, theirs = follow_masks("eager", limits, 90, rise)
    assert apart(ours, theirs) < 1e-12
    assert ours[-1].min() < 3e-5
    assert ours[-1].max() > 3.9e-4


def test_elsewhere_the_literal_mask_is_another():
    limits = Limits(1e-5, 2.4e-5, 1.07e-4)
    ours, theirs = follow_masks("eager", limits, 90, [5e-5] * 80)
    assert 1e-6 < apart(ours, theirs) < 1e-5


@each_backend
def test_the_smallest_gradients_have_signs_and_zeros_have_none(backend):
    (p,) = parameters(torch.zeros(6))
    options = {**ONLY_MASK, **WIDE._asdict()}
    optimizer = AdaptiveHinaAdamW([p], lr=5e-3, backend=backend, **options)
    tiny = 1e-45  # float32's smallest, far below its normal numbers
    for grad in (
        [tiny, tiny, -tiny, 0.0, 1.0, 1.0],
        [tiny, -tiny, -tiny, 0.0, 0.0, -0.0],
        [tiny, tiny, -tiny, 1.0, 1.0, -1.0],
    ):
        p.grad = torch.tensor(grad)
        optimizer.step()
    moved = (optimizer.masks(p) - 5e-3) / WIDE.lr_bump
    assert moved.round().tolist() == [2, -2, 2, 0, 1, -1]


def test_signs_are_those_of_the_gradient_before_any_technique():
    (p,) = parameters(*drawn((8, 9)))
    options = {**ONLY_MASK, **WIDE._asdict(), "use_orthogonal_grad": True}
    optimizer = AdaptiveHinaAdamW([p], lr=5e-3, backend="eager", **options)
    reference, turned = MaskReference(WIDE, 500), 0
    for step in range(6):
        weight = p.detach().clone()
        p.grad = drawn((8, 9), seed=step)[0] + 2 * weight
        reference.advance(p.grad, 5e-3)
        share = (weight * p.grad).sum() / (weight * weight).sum()
        turned += int(((p.grad - share * weight).sign() != p.grad.sign()).sum())
        optimizer.step()
    assert torch.equal(optimizer.masks(p), reference.mask)
    assert turned > 50


LOW_PRECISION = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("compiled", torch.bfloat16), *(("eager", d) for d in (*LOW_PRECISION, torch.float64))],
)
def test_masks_are_exact_in_other_precisions(backend, dtype):
    params = parameters(*drawn((), (9, 40), dtype=dtype))
    warmup_steps = 20 if backend == "eager" else 100  # for machine code one program will do
    options = {**ONLY_MASK, **WIDE._asdict(), "warmup_steps": warmup_steps}
    optimizer = AdaptiveHinaAdamW(params, backend=backend, **options)
    references = [MaskReference(WIDE, warmup_steps) for _ in params]
    for step in range(30):
        lr = optimizer.param_groups[0]["lr"] = 2e-3 + 4e-4 * min(step, 10)
        for p, grad, reference in zip(
            params, gradients((), (9, 40), step=step), references, strict=True
        ):
            p.grad = grad.clamp(-100, 100).to(dtype)
            reference.advance(p.grad, lr)
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            assert torch.equal(optimizer.masks(p), reference.mask), step
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in params)
