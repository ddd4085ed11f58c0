"""Machine code knows addresses: whatever moves parameters or state in between must be noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from optimizers import drawn, each_backend, hina, parameters, same
from runs import ROOT
from torch import Tensor, nn

from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.optim.native.graph import UntranslatableError
from library.optim.techniques import Descent, Technique, Work

CHANNELS_LAST = torch.channels_last


def trained(
    backend: str, start: Tensor, change: Callable[[HinaAdamWOptimizer, nn.Parameter], None]
) -> Tensor:
    """Where a parameter ends if `change` happens after three of six steps."""
    p = nn.Parameter(start.clone())
    optimizer = hina([("x.weight", p)], backend, min_8bit_size=0, spd_anchor="initial", lr=0.01)
    for step in range(6):
        if step == 3:
            change(optimizer, p)
        (grad,) = drawn(tuple(p.shape), seed=step)
        p.grad = grad.to(p.dtype)
        optimizer.step()
    return p.detach().float()


def new_memory(optimizer: HinaAdamWOptimizer, p: nn.Parameter) -> None:
    """As programs do that move an optimizer: the tensors stay, what they point to does not."""
    held = optimizer.state[p]
    for value in held.values():
        if isinstance(value, Tensor):
            value.data = value.data.clone()
    held["others"] = [torch.full((20, 30), 3, dtype=torch.int8) for _ in range(50)]


def new_tensors(optimizer: HinaAdamWOptimizer, p: nn.Parameter) -> None:
    held = optimizer.state[p]
    held.update({k: v.clone() for k, v in held.items() if isinstance(v, Tensor)})


def no_state(optimizer: HinaAdamWOptimizer, p: nn.Parameter) -> None:
    optimizer.state[p].clear()


def transposed_state(optimizer: HinaAdamWOptimizer, p: nn.Parameter) -> None:
    held = optimizer.state[p]
    held["exp_avg"] = held["exp_avg"].t().contiguous().t()


@pytest.mark.parametrize("change", [new_memory, new_tensors, no_state, transposed_state])
def test_state_in_another_place_is_found(change):
    (start,) = drawn((20, 30))
    compiled, eager = (trained(backend, start, change) for backend in ("compiled", "eager"))
    # Codes may differ by one where sums are rounded differently: a thousandth of the way.
    assert (compiled - eager).abs().max() < 1e-4
    assert (eager - start).abs().max() > 0.002


def test_of_many_tensors_one_that_is_given_other_data_is_found_too():
    """Not in the same step, but what it had before is not freed while it may be written to."""
    params = parameters(*drawn(*[(8, 8)] * 300))
    named = [(f"{k}.weight", p) for k, p in enumerate(params)]
    optimizer = hina(named, "compiled", min_8bit_size=0)

    def step() -> None:
        for p, grad in zip(params, drawn(*[(8, 8)] * 300, seed=1), strict=True):
            p.grad = grad
        optimizer.step()

    step()
    held = optimizer.state[params[151]]["exp_avg"]
    old = held.data
    held.data = torch.zeros_like(old)
    for _ in range(1 + len(params) // 64):
        step()
    assert held.any()
    assert held.data_ptr() != old.data_ptr()
    before = old.clone()
    step()
    assert torch.equal(old, before)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float32, torch.float16),
    ],
)
def test_state_follows_the_type_of_its_parameter(before, after):
    (start,) = drawn((20, 30))

    def change(optimizer: HinaAdamWOptimizer, p: nn.Parameter) -> None:
        p.data = p.data.to(after)

    ends = [trained(backend, start.to(before), change) for backend in ("compiled", "eager")]
    assert ends[0].isfinite().all()
    assert (ends[0] - ends[1]).abs().max() < 0.02  # bfloat16's spacing


def test_an_anchor_lies_as_the_parameter_is_read():
    (start,) = drawn((4, 6, 3, 3))
    plain, strided = (
        trained("compiled", x, lambda *_: None)
        for x in (start, start.to(memory_format=CHANNELS_LAST))
    )
    assert torch.equal(plain, strided)


@each_backend
@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, r"shape \(8, 20\) on cpu has a gradient of shape \(16, 20\)"),
        (1, r"'exp_avg' of x\.weight has shape \(16, 20\) where \(8, 20\) belongs"),
    ],
)
def test_a_parameter_made_smaller_is_refused(backend, steps, message):
    (p,) = parameters(*drawn((16, 20)))
    optimizer = hina([("x.weight", p)], backend)
    (p.grad,) = drawn((16, 20))
    for _ in range(steps):
        optimizer.step()
    whole = p.data
    before = whole.clone()
    with torch.no_grad():
        p.set_(whole[:8])
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    assert torch.equal(whole, before)


@each_backend
def test_a_loaded_state_of_another_shape_is_refused(backend):
    (p,) = parameters(*drawn((16, 20)))
    optimizer = hina([("x.weight", p)], backend, spd_anchor="initial")
    (p.grad,) = drawn((16, 20))
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["spd_anchor"] = torch.zeros(3)
    before = deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"'spd_anchor' of x\.weight has shape \(3,\)"):
        optimizer.load_state_dict(saved)
    assert same(optimizer.state_dict(), before)


@each_backend
def test_groups_that_were_changed_by_hand_are_seen(backend):
    """As torch's own optimizers allow it."""
    first, second, third = parameters(*drawn((5, 5), (6, 6), (7, 7)))
    groups = [{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.0}]
    optimizer = hina(groups, backend, weight_decay=0.0)

    def moved() -> list[bool]:
        before = [p.detach().clone() for p in (first, second, third)]
        for p in (first, second, third):
            p.grad = torch.ones_like(p)
        optimizer.step()
        return [not torch.equal(p, b) for p, b in zip((first, second, third), before, strict=True)]

    moved()  # ADOPT's first step moves nothing
    assert moved() == [True, False, False]
    optimizer.param_groups.reverse()
    assert moved() == [True, False, False]
    optimizer.param_groups[1]["params"].append(third)
    moved()
    assert moved() == [True, False, True]
    optimizer.param_groups.pop(0)
    assert moved() == [True, False, True]


def test_memory_that_was_taken_away_is_told():
    (p,) = parameters(*drawn((5, 5)))
    optimizer = hina([("x", p)], "compiled")
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"shape \(5, 5\)\) has no memory"):
        optimizer.step()


class Sorted(Technique):
    def apply(self, work: Work) -> None:
        work.u = work.g.sort().values


def test_what_cannot_be_translated_is_told_before_anything_moves():
    first, second = parameters(*drawn((5, 5), dtype=torch.float16), *drawn((6, 6)))
    optimizer = hina([("a", first), ("b", second)], "compiled")
    optimizer.chain = (Sorted(), Descent())
    before = [first.detach().clone(), second.detach().clone()]
    for p in (first, second):
        p.grad = torch.ones_like(p)
    with pytest.raises(UntranslatableError, match=r"'sort'.*docs/engine\.md"):
        optimizer.step()
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


STEPS = """
import sys, torch
from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
p = torch.nn.Parameter(torch.ones(8))
optimizer = HinaAdamWOptimizer([("x", p)], backend=sys.argv[1])
for _ in range(2):
    p.grad = torch.ones(8)
    optimizer.step()
assert p[0] < 1
"""


def run_with_compiler(tmp_path: Path, compiler: str, backend: str) -> subprocess.CompletedProcess:
    program = tmp_path / "compiler"
    program.write_text(f"#!/bin/sh\n{compiler}\n")
    program.chmod(0o755)
    own = {"CXX": str(program), "HINA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", STEPS, backend],
        env=os.environ | own | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_compiler_that_refuses_is_told_of_and_done_without(tmp_path):
    refuses = "echo 'unsupported option -fopenmp' >&2; exit 1"
    auto = run_with_compiler(tmp_path, refuses, "auto")
    assert auto.returncode == 0, auto.stderr
    assert auto.stderr.count("unsupported option -fopenmp") == 1
    assert "runs by PyTorch's operations" in auto.stderr
    strict = run_with_compiler(tmp_path, refuses, "compiled")
    assert strict.returncode == 1
    assert "CompilerError" in strict.stderr
    assert "unsupported option -fopenmp" in strict.stderr


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    finished = run_with_compiler(tmp_path, 'exec g++ "$@"', "compiled")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("cannot be written") == 1
