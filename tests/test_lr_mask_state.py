"""How `lr_mask` is held, frozen, saved and continued, and which arguments are refused."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lr_masks import DEFAULT, ONLY_MASK, WIDE, Limits, MaskReference, gradients
from optimizers import drawn, each_backend, parameters, same
from torch import Tensor, nn

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.arguments import OptimizerArgumentError
from library.optim.native.availability import problem
from library.optim.native.build import compilations
from library.optim.state import pack_high, unpack_high

SHAPES = [(), (7,), (16, 24), (61, 70)]
WARMUP = 12


def adaptive(params: Any, backend: str = "eager", **options: Any) -> AdaptiveHinaAdamW:
    """As it is by default, in 8 bits where a tensor is large, with a short warm-up."""
    given = {"lr": 3e-4, "warmup_steps": WARMUP, "relationship_discovery_interval": 5, **options}
    return AdaptiveHinaAdamW(params, backend=backend, **given)


def train(optimizer: AdaptiveHinaAdamW, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * min(step, 8) * (0.9 ** max(step - 15, 0))
        shapes = [tuple(p.shape) for p in params]
        for p, grad in zip(params, gradients(*shapes, step=step), strict=True):
            p.grad = grad
        optimizer.step()


def held_bytes(optimizer: AdaptiveHinaAdamW, param: Tensor) -> int:
    return sum(
        value.numel() * value.element_size()
        for value in optimizer.state[param].values()
        if isinstance(value, Tensor)
    )


@each_backend
def test_bytes_of_state_in_warmup_and_after(backend):
    (p,) = params = parameters(*drawn((256, 64)))
    optimizer = adaptive(params, backend, warmup_steps=4)
    train(optimizer, params, range(1, 4))
    entry = optimizer.state[p]
    assert entry["lr_walk"].dtype == torch.int16
    assert held_bytes(optimizer, p) / p.numel() < 4.3
    train(optimizer, params, range(4, 5))
    assert "lr_walk" not in entry
    assert entry["lr_mask"].dtype == torch.uint8
    assert entry["lr_mask"].shape == p.shape
    assert held_bytes(optimizer, p) / p.numel() < 3.1


def at_rest(apart: int, backend: str) -> tuple[nn.Parameter, AdaptiveHinaAdamW]:
    """The last step before the freeze, with a tensor whose masks are so many bumps apart."""
    (p,) = parameters(torch.zeros(300))
    options = {**ONLY_MASK, **WIDE._asdict(), "warmup_steps": 2}
    optimizer = AdaptiveHinaAdamW([p], lr=1.5e-2, weight_decay=0, backend=backend, **options)
    p.grad = torch.ones(300)
    optimizer.step()
    bumps = torch.arange(300) % 250 - apart + 400
    bumps[5], bumps[280] = 400 - apart, 400
    optimizer.state[p]["lr_walk"] = (bumps << 2 | 1).to(torch.int16)
    return p, optimizer


@each_backend
@pytest.mark.parametrize("apart", [255, 256, 1023, 1024, 1800])
def test_a_frozen_mask_is_as_wide_as_it_must_be(backend, apart):
    p, optimizer = at_rest(apart, backend)
    mask = optimizer.masks(p)
    assert float(mask.max() - mask.min()) == pytest.approx(apart * WIDE.lr_bump)
    optimizer.param_groups[0]["lr"] = 1e-2
    for _ in range(2):
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(optimizer.masks(p), mask)
        # The gradient is one, and so is Adam's update of each element.
        moved = (before - p.detach()).double() / 1e-2
        assert torch.allclose(moved, mask / 1.5e-2, rtol=0, atol=1e-5)
    entry = optimizer.state[p]
    assert entry["lr_mask"].dtype == (torch.uint8 if apart < 1024 else torch.int16)
    packed = 256 <= apart < 1024
    assert ("lr_mask_high" in entry) == packed
    if packed:
        assert entry["lr_mask_high"].dtype == torch.uint8
        assert entry["lr_mask_high"].numel() == 2 * 64, "a quarter of two blocks"


@each_backend
def test_a_long_way_apart_by_signs_alone(backend):
    (p,) = parameters(torch.zeros(2, 150))
    options = {**ONLY_MASK, **WIDE._asdict(), "warmup_steps": 520}
    optimizer = AdaptiveHinaAdamW([p], lr=1e-2, backend=backend, **options)
    reference = MaskReference(WIDE, 520)
    for step in range(525):
        p.grad = torch.ones_like(p)
        p.grad[1] = (-1) ** step
        reference.advance(p.grad, 1e-2)
        optimizer.step()
    assert torch.equal(optimizer.masks(p), reference.mask)
    assert reference.mask.max() - reference.mask.min() > 1030 * WIDE.lr_bump
    assert optimizer.state[p]["lr_mask"].dtype == torch.int16


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_state_dict(
    optimizer: AdaptiveHinaAdamW, params: list[nn.Parameter], backend: str
) -> tuple[AdaptiveHinaAdamW, list[nn.Parameter]]:
    others = parameters(*params)
    fresh = adaptive(others, backend)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return fresh, others


def deepcopied(
    optimizer: AdaptiveHinaAdamW, params: list[nn.Parameter], backend: str
) -> tuple[AdaptiveHinaAdamW, list[nn.Parameter]]:
    other = copy.deepcopy(optimizer)
    return other, other.param_groups[0]["params"]


def pickled(
    optimizer: AdaptiveHinaAdamW, params: list[nn.Parameter], backend: str
) -> tuple[AdaptiveHinaAdamW, list[nn.Parameter]]:
    other = pickle.loads(pickle.dumps(optimizer))
    return other, other.param_groups[0]["params"]


@each_backend
@pytest.mark.parametrize(
    ("way", "after"),
    [
        *((through_state_dict, after) for after in (1, 6, WARMUP - 1, WARMUP, WARMUP + 3)),
        *((way, after) for way in (deepcopied, pickled) for after in (6, WARMUP)),
    ],
)
def test_continues_bit_for_bit(backend, way: Callable[..., Any], after):
    params = parameters(*drawn(*SHAPES))
    optimizer = adaptive(params, backend)
    train(optimizer, params, range(1, after + 1))
    other, others = way(optimizer, params, backend)
    assert same([other.masks(q) for q in others], [optimizer.masks(p) for p in params])
    for step in range(after + 1, after + 8):
        train(optimizer, params, range(step, step + 1))
        train(other, others, range(step, step + 1))
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(optimizer.masks(p), other.masks(q))
            assert same(optimizer.state[p], other.state[q])
            assert ("lr_walk" in other.state[q]) == (step < WARMUP)


@each_backend
@pytest.mark.parametrize("after", [6, WARMUP - 1, WARMUP])
def test_continues_bit_for_bit_in_other_groups_by_name(backend, after):
    names = ["a", "b", "c", "d"]
    params = parameters(*drawn(*SHAPES))
    optimizer = adaptive(list(zip(names, params, strict=True)), backend)
    train(optimizer, params, range(1, after + 1))
    others = parameters(*params)
    named = list(zip(names, others, strict=True))
    other = adaptive([{"params": named[2:]}, {"params": named[:2][::-1]}], backend)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, params, range(after + 1, after + 8))
    train(other, others, range(after + 1, after + 8))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(optimizer.masks(p), other.masks(q))
        assert torch.equal(p, q)


def test_a_frozen_mask_stays_frozen_when_the_warmup_is_longer_now():
    params = parameters(*drawn(*SHAPES))
    optimizer = adaptive(params)
    train(optimizer, params, range(1, WARMUP + 1))
    masks = [optimizer.masks(p) for p in params]
    other = adaptive(params, warmup_steps=100)
    other.load_state_dict(optimizer.state_dict())
    train(other, params, range(WARMUP + 1, WARMUP + 6))
    assert same([other.masks(p) for p in params], masks)
    assert all("lr_walk" not in other.state[p] for p in params)


def test_a_mask_freezes_at_once_when_the_warmup_is_shorter_now():
    params = parameters(*drawn(*SHAPES))
    optimizer = adaptive(params)
    train(optimizer, params, range(1, 10))
    masks = [optimizer.masks(p) for p in params]
    other = adaptive(params, warmup_steps=4)
    other.load_state_dict(optimizer.state_dict())
    train(other, params, range(10, 13))
    assert same([other.masks(p) for p in params], masks)
    assert all("lr_walk" not in other.state[p] for p in params)


@each_backend
@pytest.mark.parametrize("steps", [5, 40])
@pytest.mark.parametrize("limits", [DEFAULT, Limits(3e-6, 5e-5, 1e-3)])
def test_a_mask_that_begins_in_the_middle_of_a_run_starts_at_lr(backend, steps, limits):
    """The state of another optimizer, or of a run without masks, has none."""
    params = parameters(*drawn((7,), (16, 24)))
    adamw = torch.optim.AdamW(params)
    for step in range(steps):
        for p, grad in zip(params, gradients((7,), (16, 24), step=step), strict=True):
            p.grad = grad
        adamw.step()
    options = {**ONLY_MASK, **limits._asdict()} if backend == "eager" else {}
    optimizer = adaptive(params, backend, **options)
    optimizer.load_state_dict(adamw.state_dict())
    references = [MaskReference(limits, WARMUP - steps) for _ in params]
    assert all(optimizer.masks(p) is None for p in params)
    for step in range(12):
        lr = optimizer.param_groups[0]["lr"] = 3e-4 + 1e-5 * step
        for p, grad, reference in zip(
            params, gradients((7,), (16, 24), step=step), references, strict=True
        ):
            p.grad = grad
            reference.advance(grad, lr)
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            assert torch.equal(optimizer.masks(p), reference.mask), step


@given(values=st.lists(st.integers(0, 1023), min_size=1, max_size=8), blocks=st.integers(1, 4))
def test_packing_keeps_ten_bits(values, blocks):
    repeats = -(-256 * blocks // len(values))
    values = torch.tensor(values * repeats, dtype=torch.int32)[: 256 * blocks].view(blocks, 256)
    high = pack_high(values)
    assert high.dtype == torch.uint8
    assert high.shape == (blocks, 64)
    assert torch.equal((unpack_high(high) << 8) + (values & 255), values)


def test_packed_bits_lie_in_quarters_of_a_block():
    values = torch.zeros(1, 256, dtype=torch.int32)
    for quarter, value in enumerate((256, 512, 768, 1023)):
        values[0, 64 * quarter + 3] = value
    high = pack_high(values)
    assert int(high[0, 3]) == 1 | 2 << 2 | 3 << 4 | 3 << 6
    assert int(high.sum()) == int(high[0, 3])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min_lr": 2e-3}, ["min_lr=0.002", "max_lr=0.001"]),
        ({"max_lr": 1e-8}, ["min_lr=1e-07", "max_lr=1e-08"]),
        ({"lr_bump": 1e-7, "warmup_steps": 9000}, ["lr_bump=1e-07", "9000", "8191"]),
        ({"lr_bump": 1e-9, "min_lr": 1e-5}, ["lr_bump=1e-09", "min_lr=1e-05", "max_lr=0.001"]),
    ],
)
def test_impossible_limits_are_refused_by_name(options, named):
    with pytest.raises(OptimizerArgumentError) as error:
        AdaptiveHinaAdamW(parameters(torch.zeros(3)), **options)
    assert all(text in str(error.value) for text in named)
    with pytest.raises(OptimizerArgumentError):
        AdaptiveHinaAdamW.validate(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_bump": 1e-7, "warmup_steps": 8000},  # as few steps as that fit
        {"lr_bump": 2e-7, "warmup_steps": 9000},  # as near limits do
        {"min_lr": 1e-3},
        {"min_lr": 0.0, "lr_bump": 1e-9},
    ],
)
def test_possible_limits_are_taken(options):
    AdaptiveHinaAdamW.validate(**options)


def test_masks_at_the_ends_of_what_is_held():
    """As far as 16 bits reach, in both directions; a limit more is refused."""
    limits = Limits(1e-6, 0.0, 1.0)
    (p,) = parameters(torch.zeros(4))
    options = {**ONLY_MASK, **limits._asdict(), "warmup_steps": 8189}
    AdaptiveHinaAdamW.validate(**options)
    with pytest.raises(OptimizerArgumentError, match="lr_bump"):
        AdaptiveHinaAdamW.validate(**{**options, "warmup_steps": 8190})
    optimizer = AdaptiveHinaAdamW([p], lr=0.5, backend="eager", **options)
    p.grad = torch.tensor([1.0, 1.0, -1.0, 0.0])
    optimizer.step()
    furthest = torch.tensor([8188, -8188, 8188, 0])
    optimizer.state[p]["lr_walk"] = (furthest << 2 | torch.tensor([1, 1, 3, 0])).to(torch.int16)
    p.grad = torch.tensor([1.0, -1.0, -1.0, 0.0])
    optimizer.step()
    moved = ((optimizer.masks(p) - 0.5) / 1e-6).round()
    assert moved.tolist() == [8189, -8189, 8189, 0]


@pytest.mark.parametrize(("lr", "warns"), [(2e-3, True), (1e-3, False)])
def test_a_learning_rate_above_max_lr_is_warned_of(lr, warns, caplog):
    with caplog.at_level(logging.WARNING):
        AdaptiveHinaAdamW(parameters(torch.zeros(3)), lr=lr)
        AdaptiveHinaAdamW(parameters(torch.zeros(3)), lr=lr, use_lr_mask=False)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == warns
    assert all("0.002" in text and "max_lr=0.001" in text for text in warnings)
    with caplog.at_level(logging.WARNING):
        groups = [{"params": [p]} for p in parameters(torch.zeros(3), torch.zeros(2))]
        groups[1]["lr"] = math.pi
        AdaptiveHinaAdamW(groups)
    assert "3.14159" in caplog.records[-1].getMessage()


def test_what_runs_frozen_masks_is_compiled_in_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problem() is None  # found out with a program of its own, once in a process
    monkeypatch.setenv("HINA_CACHE", str(tmp_path))
    params = parameters(*drawn((61, 70), (7,)))
    optimizer = adaptive(params, "compiled", weight_decay=0.0123)
    train(optimizer, params, range(1, 2))
    at_first = compilations()
    train(optimizer, params, range(2, WARMUP + 3))
    assert "lr_mask" in optimizer.state[params[0]]
    assert compilations() == at_first
    assert len(list(tmp_path.glob("*.so"))) == 4  # large and small tensors, moving and frozen


def test_there_are_no_masks_where_they_are_off() -> None:
    params = parameters(*drawn((61, 70)))
    moving = adaptive(params)
    train(moving, params, range(1, 4))
    without = adaptive(params, use_lr_mask=False)
    without.load_state_dict(moving.state_dict())
    assert moving.masks(params[0]) is not None
    assert without.masks(params[0]) is None


def test_a_rate_of_zero_between_masks_of_zero_moves_nothing() -> None:
    params = parameters(*drawn((61, 70)))
    optimizer = adaptive(params, min_lr=0.0, adaptation_strength=3.0)
    optimizer.param_groups[0]["lr"] = 0.0
    before = params[0].detach().clone()
    for step in range(3):
        params[0].grad = drawn((61, 70), seed=step)[0]
        optimizer.step()
    assert torch.equal(params[0], before)
