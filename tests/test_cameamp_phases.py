"""What begins and ends with a phase, at which step, and that nothing is compiled then."""

from __future__ import annotations

import copy

import pytest
import torch
from cameamp_reference import drawn
from optimizers import each_backend
from torch import nn

from library.custom_automagic_cameamp_optimizer import Automagic_CameAMP8bit
from library.optim.cameamp import CameAMP, phase_of
from library.optim.native import build

WARMUP = 6  # early until 3, late until 6, stable until 12


def optimizer_on(params: dict[str, nn.Parameter], backend: str = "auto") -> CameAMP:
    options = {"lr": 1e-4, "warmup_steps": WARMUP, "min_8bit_size": 0, "lr_bump": 1e-6}
    return Automagic_CameAMP8bit(params.items(), backend=backend, **options)


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p) for name, p in drawn(0, 0.1).items()}


def step(optimizer: CameAMP, params: dict[str, nn.Parameter], number: int) -> None:
    for name, grad in drawn(number, 1e-2).items():
        params[name].grad = grad
    optimizer.step()


@pytest.mark.parametrize(
    ("number", "warmup", "phase"),
    [
        (1, 500, "early_warmup"),
        (249, 500, "early_warmup"),
        (250, 500, "late_warmup"),
        (499, 500, "late_warmup"),
        (500, 500, "stable"),
        (999, 500, "stable"),
        (1000, 500, "mature"),
        (2, 5, "early_warmup"),
        (3, 5, "late_warmup"),
        (1, 1, "stable"),
        (2, 1, "mature"),
    ],
)
def test_phases_by_step(number, warmup, phase):
    assert phase_of(number, warmup) == phase


@each_backend
def test_what_acts_changes_at_exactly_these_steps(backend):
    """Torque is measured in early warm-up alone, elements are masked from late warm-up on, and
    the learning rates of elements stand still from the stable phase on."""
    params = parameters()
    optimizer = optimizer_on(params, backend)
    masks = {}
    for number in range(1, 2 * WARMUP + 2):
        step(optimizer, params, number)
        reported = optimizer.last_step[0].values
        assert ("tam/alignment" in reported) == (number < 3)
        assert ("cautious/masked_share" in reported) == (number >= 3)
        assert optimizer.phase == phase_of(number, WARMUP)
        for name, p in params.items():
            state = optimizer.state[p]
            assert ("tam_alignment" in state) == (number < 3), "kept no longer than of use"
            assert ("lr_walk" in state) == (number < WARMUP)
            mask = optimizer.masks(p)
            if number >= WARMUP:
                assert torch.equal(mask, masks[name])
            elif number > 2 and name != "one":
                assert not torch.equal(mask, masks[name])
            masks[name] = mask


def test_a_phases_end_compiles_nothing():
    params = parameters()
    optimizer = optimizer_on(params, "compiled")
    step(optimizer, params, 1)
    made = build.compilations()
    for number in range(2, 2 * WARMUP + 2):
        optimizer.param_groups[0]["lr"] = 1e-4 / number
        step(optimizer, params, number)
    assert build.compilations() == made
    # Both kinds of tensors (factored or not) in three phases of programs, all there from the start.
    variants = {optimizer.variant(p) for p in params.values()}
    assert all(variant.chain == optimizer._acting(2 * WARMUP + 2) for variant in variants)


def test_parameters_in_different_phases_train_beside_each_other():
    """One joins late: its steps are its own, and the others' come out the same as without it."""
    params, alone = parameters(), parameters()
    late = params.pop("square")
    alone.pop("square")
    optimizer, without = optimizer_on({**params, "square": late}), optimizer_on(alone)
    for number in range(1, 2 * WARMUP):
        grads = drawn(number, 1e-2)
        late.grad = grads["square"] if number > 4 else None
        for name, p in params.items():
            p.grad, alone[name].grad = grads[name], grads[name].clone()
        optimizer.step()
        without.step()
        if number > 4:
            assert optimizer.state[late]["step"] == number - 4
    for name, p in params.items():
        assert torch.equal(p, alone[name]), name
    first = optimizer_on({"square": (lone := nn.Parameter(drawn(0, 0.1)["square"]))})
    for number in range(5, 2 * WARMUP):
        lone.grad = drawn(number, 1e-2)["square"]
        first.step()
    # Noise comes from the name, and so the same.
    assert torch.equal(lone, late)


@each_backend
@pytest.mark.parametrize("stop", [1, 2, 4, 5, 8])
def test_a_checkpoint_in_any_phase_continues_bit_for_bit(backend, stop):
    params = parameters()
    optimizer = optimizer_on(params, backend)
    for number in range(1, stop + 1):
        step(optimizer, params, number)
    other = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    resumed = optimizer_on(other, backend)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(stop + 1, 2 * WARMUP):
        step(optimizer, params, number)
        step(resumed, other, number)
    for name, p in params.items():
        assert torch.equal(p, other[name]), name
