"""State of the CameAMP family: bytes, precisions, checkpoints, and C-Optim's part of them."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from cameamp_reference import drawn
from optimizers import same
from torch import Tensor, nn

from library.custom_automagic_cameamp_optimizer import (
    Automagic_CameAMP,
    Automagic_CameAMP8bit,
    Automagic_CameAMP_COptim,
    Automagic_CameAMP_COptim8bit,
)
from library.optim.state import decode

BIG = {"down": (16, 640), "up": (1280, 16), "norm": (640,)}


def lora() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        for name, shape in BIG.items()
    }


def train(optimizer: Any, params: dict[str, nn.Parameter], first: int, last: int) -> None:
    for number in range(first, last + 1):
        generator = torch.Generator().manual_seed(number)
        for p in params.values():
            p.grad = 1e-3 * torch.randn(p.shape, generator=generator)
        optimizer.step()


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = (v for entry in optimizer.state.values() for v in entry.values())
    return sum(v.nbytes for v in tensors if isinstance(v, Tensor))


def test_memory_stats_are_counted_from_what_is_held():
    params = lora()
    optimizer = Automagic_CameAMP8bit(params.items(), lr=1e-4, warmup_steps=4, backend="eager")
    nothing = {"total_quantized_memory": 0, "total_high_precision_memory": 0}
    assert optimizer.get_memory_stats() == {**nothing, "compression_ratio": 1.0}
    for steps in (3, 5):
        train(optimizer, params, 1, steps)
        stats = optimizer.get_memory_stats()
        total = stats["total_quantized_memory"] + stats["total_high_precision_memory"]
        assert total == held_bytes(optimizer)
        # m in 8 bits, the mask in 16 or 8, little beside: against 4 bytes for each of the two.
        assert stats["compression_ratio"] > (2.4 if steps == 3 else 3.4)
    params = lora()
    options = {"use_lr_mask": False, "use_tam": False, "backend": "eager"}
    exact = Automagic_CameAMP(params.items(), lr=1e-4, **options)
    train(exact, params, 1, 1)
    assert exact.get_memory_stats()["compression_ratio"] == 1.0


def test_what_others_keep_beside_is_not_counted():
    params = lora()
    optimizer = Automagic_CameAMP(params.items(), lr=1e-4, backend="eager")
    train(optimizer, params, 1, 1)
    before = optimizer.get_memory_stats()
    frozen = nn.Parameter(torch.zeros(3))
    optimizer.state[frozen]["anything"] = torch.zeros(100)
    assert optimizer.get_memory_stats() == before


@pytest.mark.parametrize(
    ("full", "anchored"), [(False, {"dora_scale"}), (True, {"up", "dora_scale"})]
)
def test_scales_are_pulled_to_what_they_began_with(full, anchored):
    params = {
        "m.lora_up.weight": nn.Parameter(torch.zeros(8, 4)),
        "m.dora_scale": nn.Parameter(torch.ones(8, 1)),
        "up": nn.Parameter(torch.zeros(8, 4)),
    }
    optimizer = Automagic_CameAMP(params.items(), lr=1e-4, full_finetune=full, backend="eager")
    train(optimizer, params, 1, 1)
    kept = {name.split(".")[-1] for name, p in params.items() if "spd_anchor" in optimizer.state[p]}
    assert anchored <= kept
    assert full or kept == anchored


def test_bytes_for_each_parameter():
    """Spec 1 §7 on halves as large as SDXL's: at most 3.3 in warm-up, 2.2 afterwards."""
    shapes = {"down": (16, 1280), "up": (1280, 16), "wide": (16, 10240), "tall": (10240, 16)}
    params = {name: nn.Parameter(0.02 * torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = Automagic_CameAMP8bit(params.items(), lr=1e-4, warmup_steps=20, backend="eager")
    elements = sum(p.numel() for p in params.values())
    train(optimizer, params, 1, 10)
    assert held_bytes(optimizer) / elements <= 3.3
    train(optimizer, params, 11, 21)
    assert held_bytes(optimizer) / elements <= 2.2


@pytest.mark.parametrize("to", [8, 32])
def test_rows_and_columns_convert_between_precisions(to, caplog):
    caplog.set_level("INFO")
    params, options = lora(), {"lr": 1e-4, "backend": "eager"}
    optimizer = Automagic_CameAMP(params.items(), optim_bits=40 - to, **options)
    train(optimizer, params, 1, 3)
    other = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    converted = Automagic_CameAMP(other.items(), optim_bits=to, **options)
    converted.load_state_dict(optimizer.state_dict())
    direction = "from float32 to 8 bits" if to == 8 else "from 8 bits to float32"
    assert direction in caplog.text
    train(optimizer, params, 4, 6)
    train(converted, other, 4, 6)
    start = lora()
    for name, p in params.items():
        moved = (p - start[name]).abs().mean()
        assert (p - other[name]).abs().mean() < 0.15 * moved, name


def test_a_state_of_other_rows_is_refused():
    params = lora()
    optimizer = Automagic_CameAMP(params.items(), lr=1e-4, backend="eager")
    train(optimizer, params, 1, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq_row"] = torch.zeros(17)
    with pytest.raises(ValueError, match=r"exp_avg_sq_row.*down.*\(17,\).*\(16, 640\)"):
        Automagic_CameAMP(lora().items(), lr=1e-4).load_state_dict(saved)


def test_rounding_to_the_nearest_when_errors_are_not_corrected():
    """Half of the columns' gradients become smaller. Less than half a code in a step is lost in
    the average of their squares, unless rounding is stochastic."""
    averages = {}
    for correction in (True, False):
        p = nn.Parameter(torch.zeros(32, 512))
        options = {"min_8bit_size": 0, "error_correction": correction, "lr": 1e-4}
        options |= {"use_lr_mask": False, "use_orthogonal_grad": False, "backend": "eager"}
        optimizer = Automagic_CameAMP8bit([p], **options)
        expected = torch.zeros(512)
        for step in range(120):
            size = torch.full((512,), 1e-2)
            size[::2] *= 1.0 if step < 20 else 0.5
            p.grad = size.expand(32, 512).clone()
            expected = 0.99 * expected + 0.01 * size**2
            optimizer.step()
        state = optimizer.state[p]
        codes = state["exp_avg_sq_col"].view(-1, 256).int()
        values = decode(codes, state["exp_avg_sq_col_scale"].view(-1, 1), "column").flatten()
        averages[correction] = float((values / expected)[::2].mean())
    assert averages[True] == pytest.approx(1, abs=0.05)
    assert averages[False] > 1.3


def test_what_c_optim_knows_goes_along_with_a_checkpoint():
    """Resumed in another object from bytes, the multipliers are the same to the last bit."""

    def losses(number: int) -> float:
        return 1.0 * 0.98**number + 0.05 * math.sin(number)

    def course(optimizer: Any, params: Any, first: int, last: int) -> list[float]:
        multipliers = []
        for number in range(first, last + 1):
            optimizer.update_context(loss=losses(number))
            train(optimizer, params, number, number)
            multipliers.append(optimizer.c_optim.compute_contextual_lr_multiplier())
        return multipliers

    params = lora()
    kind = Automagic_CameAMP_COptim8bit
    optimizer = kind(params.items(), lr=1e-4, context_window=20, backend="eager")
    course(optimizer, params, 1, 14)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    resumed = kind(other.items(), lr=1e-4, context_window=20, backend="eager")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    expected = course(optimizer, params, 15, 30)
    assert course(resumed, other, 15, 30) == expected
    assert len(set(expected)) > 10, "it moves"
    assert all(torch.equal(p, other[name]) for name, p in params.items())
    assert same(optimizer.state_dict(), resumed.state_dict())


def test_the_multiplier_acts_on_the_step():
    """lr times the multiplier, and nothing else: mask and decay aside."""
    moved = {}
    for told in (False, True):
        params = lora()
        off = {"use_lr_mask": False, "weight_decay": 0.0, "use_spd": False}
        optimizer = Automagic_CameAMP_COptim(params.items(), lr=1e-4, backend="eager", **off)
        for number in range(1, 13):
            if told:
                optimizer.update_context(1.0 * 0.9**number)
            before = {name: p.detach().clone() for name, p in params.items()}
            train(optimizer, params, number, number)
        multiplier = optimizer.c_optim.compute_contextual_lr_multiplier()
        change = {name: (p.detach() - before[name]).abs().sum() for name, p in params.items()}
        moved[told] = multiplier, change
    (low, small), (high, large) = moved[False], moved[True]
    assert high > low + 0.05
    for name in BIG:
        assert large[name] / small[name] == pytest.approx(high / low, rel=0.05)


def test_the_loss_comes_by_the_closure_too():
    params = lora()
    optimizer = Automagic_CameAMP_COptim(params.items(), lr=1e-4, backend="eager")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params.values())
        loss.backward()
        return loss

    seen = [float(optimizer.step(closure)) for _ in range(3)]
    assert optimizer.state_dict()["c_optim"]["losses"] == pytest.approx(seen)
    with pytest.raises(ValueError, match="loss of nan"):
        optimizer.update_context(float("nan"))
    with pytest.raises(ValueError, match="closure of `step` has to return it"):
        optimizer.step(lambda: None)


def test_a_loss_that_is_not_finite_is_passed_over_with_its_step():
    params = lora()
    options = {"nonfinite": "skip", "backend": "eager"}
    optimizer = Automagic_CameAMP_COptim(params.items(), lr=1e-4, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p * float("nan")).sum() for p in params.values())
        loss.backward()
        return loss

    assert math.isnan(optimizer.step(closure))
    assert optimizer.skipped_steps == 1
    assert optimizer.state_dict()["c_optim"]["losses"] == []


def test_a_copy_goes_its_own_way():
    params = {name: nn.Parameter(p) for name, p in drawn(0, 0.1).items()}
    optimizer = Automagic_CameAMP_COptim(params.items(), lr=1e-4, backend="eager")
    train(optimizer, params, 1, 2)
    twin = copy.deepcopy(optimizer)
    optimizer.update_context(1.0)
    assert twin.c_optim.state_dict() != optimizer.c_optim.state_dict()
    context = next(link for link in twin.chain if hasattr(link, "context")).context
    assert context is twin.c_optim, "the chain's context is the optimizer's own"
