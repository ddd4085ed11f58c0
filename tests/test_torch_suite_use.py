"""What PyTorch asks of an optimizer in a training program, asked of HinaAdamW: memory as it comes,
closures, errors, and the tools of a training loop (see `test_torch_suite.py`)."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import (
    CASES,
    drawn,
    each_backend,
    each_case,
    follow,
    hina,
    named,
    parameters,
    same,
)
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel

SHAPE = (6, 4, 5, 3)


def with_gaps(tensor: Tensor) -> Tensor:
    return torch.full((*tensor.shape, 2), torch.nan)[..., 0].copy_(tensor)


def misaligned(tensor: Tensor) -> Tensor:
    """At an odd address, with values before and behind that are none of its own."""
    return torch.full((tensor.numel() + 9,), torch.nan)[1:-8].view(tensor.shape).copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "with gaps": with_gaps,
    "misaligned": misaligned,
}


def steps_of(backend: str, param: nn.Parameter, layout: Callable[[Tensor], Tensor]) -> Tensor:
    """Three steps with everything on; the gradients must stay as they are."""
    optimizer = hina(named(param), backend, optim_bits=32, use_orthogonal_grad=True, lr=0.01)
    for seed in range(3):
        (grad,) = drawn(tuple(param.shape), seed=seed + 1)
        param.grad = layout(grad)
        assert param.grad.shape == grad.shape
        optimizer.step()
        assert torch.equal(param.grad, grad)
    return param.detach()


@each_backend
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", LAYOUTS)
def test_strides_change_nothing(backend, of_param, of_grad):
    (start,) = drawn(SHAPE)
    expected = steps_of(backend, nn.Parameter(start.clone()), torch.clone)
    memory = LAYOUTS[of_param](start)
    param, stride = nn.Parameter(memory), memory.stride()
    got = steps_of(backend, param, LAYOUTS[of_grad])
    assert param.stride() == stride
    assert param.data_ptr() == memory.data_ptr()
    # The order in which a tensor's elements are summed may differ.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got, start, atol=1e-3)


@each_backend
def test_expanded_gradients(backend):
    """Of a sum or a mean autograd gives one number with strides of zero."""
    (start,) = drawn((40, 30))
    expanded, whole = parameters(start, start)
    optimizers = [hina(named(p), backend, optim_bits=32) for p in (expanded, whole)]
    for _ in range(3):
        expanded.grad = torch.tensor(0.3).expand(40, 30)
        whole.grad = torch.full((40, 30), 0.3)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(expanded, whole)
    assert expanded.grad.stride() == (0, 0)


@each_backend
@pytest.mark.parametrize("case", ["8-bit state", "nothing on"])
def test_neighbours_in_memory_are_not_written(backend, case):
    """Parameters that are parts of one buffer, as in flattened models."""
    (memory,) = drawn((1000,))
    before = memory.clone()
    params = [nn.Parameter(memory[start : start + 47]) for start in range(3, 900, 53)]
    optimizer = hina(named(*params), backend, **CASES[case])
    follow([optimizer], params, 3)
    own = torch.zeros(1000, dtype=torch.bool)
    for start in range(3, 900, 53):
        own[start : start + 47] = True
    assert torch.equal(memory[~own], before[~own])
    assert (memory != before)[own].float().mean() > 0.99


@each_backend
@each_case
def test_autograd_sees_that_parameters_were_changed(backend, options):
    """A graph from before the step would give gradients of other values: it must be refused."""
    w = nn.Parameter(torch.ones(40))
    optimizer = hina(named(w), backend, **options)
    w.grad = torch.ones(40)
    optimizer.step()
    loss = (w * w).sum()
    version = w._version
    optimizer.step()
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_backend
def test_it_is_freed_with_its_last_reference(backend):
    """And with it state and parameters: no cycle, and nothing remembered elsewhere."""
    param = nn.Parameter(torch.ones(5000))
    optimizer = hina(named(param), backend)
    follow([optimizer], [param], 3)
    remembered = weakref.ref(optimizer), weakref.ref(param)
    gc.disable()
    try:
        del optimizer, param
        assert [item() for item in remembered] == [None, None]
    finally:
        gc.enable()


@each_backend
@each_case
def test_a_closure_is_called_once_with_gradients_enabled(backend, options):
    (w,) = parameters(*drawn((300,)))
    optimizer = hina(named(w), backend, **options)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        seen.append(loss)
        return loss

    with torch.no_grad():
        returned = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert len(seen) == 1
    assert seen[0] is returned
    first = returned.item()
    for _ in range(5):
        returned = optimizer.step(closure=closure)
    assert returned.item() < first
    assert optimizer.step() is None


@each_backend
def test_an_error_in_the_closure_changes_nothing(backend):
    (w,) = parameters(*drawn((300,)))
    optimizer = hina(named(w), backend, min_8bit_size=0)
    start = follow([optimizer], [w], 2), copy.deepcopy(optimizer.state_dict())

    def closure() -> Tensor:
        raise KeyError("in the model")

    with pytest.raises(KeyError, match="in the model"):
        optimizer.step(closure)
    assert same(start, ([w.detach()], optimizer.state_dict()))


ONE, TWO = parameters(*drawn((1, 1), (1, 1)))
ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a tensor alone": (ONE, {}, TypeError, "iterable of Tensors"),
    "nothing": ([], {}, ValueError, "empty parameter list"),
    "no tensor": (["p"], {}, TypeError, "can only optimize Tensors"),
    "a set": ([{"params": {ONE}}], {}, TypeError, "ordered collections"),
    "no leaf": ([ONE * 2], {}, ValueError, "non-leaf"),
    "twice in a group": ([("a", ONE), ("b", ONE)], {}, UserWarning, "duplicate parameters"),
    "in two groups": (
        [{"params": ONE}, {"params": ONE}],
        {},
        ValueError,
        "more than one parameter group",
    ),
    "a name missing": ([("one", ONE), TWO], {}, ValueError, "names are missing"),
    "too few names": ([{"params": [ONE, TWO], "named": ["one"]}], {}, ValueError, "name"),
    "complex": ([ONE.to(torch.complex64).detach()], {}, ValueError, "complex64"),
    "integer": ([torch.ones(3, dtype=torch.int64)], {}, ValueError, "int64"),
    "two learning rates": ([ONE], {"lr": torch.tensor([0.1, 0.1])}, ValueError, "lr"),
    "lr below zero": ([ONE], {"lr": -1e-3}, ValueError, "lr"),
    "lr of a group below zero": ([{"params": [ONE], "lr": -1.0}], {}, ValueError, "lr"),
    "beta 1": ([ONE], {"betas": (1.0, 0.0)}, ValueError, "betas"),
    "beta 2": ([ONE], {"betas": (0.0, 1.0)}, ValueError, "betas"),
    "eps": ([ONE], {"eps": -1e-8}, ValueError, "eps"),
    "weight decay": ([ONE], {"weight_decay": -1}, ValueError, "weight_decay"),
    "an unknown option": ([ONE], {"amsgrad": True}, TypeError, "amsgrad"),
    "an option that a group has not": (
        [{"params": [ONE], "optim_bits": 8}],
        {},
        ValueError,
        "optim_bits",
    ),
}


@each_backend
@pytest.mark.parametrize("name", ERRORS)
def test_errors(backend, name):
    params, options, error, message = ERRORS[name]
    expect = pytest.warns if issubclass(error, Warning) else pytest.raises
    with expect(error, match=message):
        hina(params, backend, **options)


class Regression:
    """A small network and an optimizer, stepped on batches that depend on the step alone."""

    def __init__(self, backend: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2))
        options = {"lr": 0.01, "min_8bit_size": 0, **options}
        self.optimizer = hina(self.model.named_parameters(), backend, **options)

    def loss(self, seed: int) -> Tensor:
        x, y = drawn((8, 6), (8, 2), seed=seed)
        return (self.model(x) - y).square().mean()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


@each_backend
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_accumulate(backend, set_to_none):
    """Whether they are kept in the same memory or not makes no difference."""
    run, plain = Regression(backend), Regression(backend)
    for step in range(4):
        for micro in range(3):
            run.loss(3 * step + micro).backward()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=set_to_none)
        plain.model.zero_grad(set_to_none=True)
        for micro in range(3):
            plain.loss(3 * step + micro).backward()
        plain.optimizer.step()
    assert same(run.weights(), plain.weights())


@each_backend
def test_a_gradient_scaler_scales_and_skips(backend):
    """Scaling by a power of two is exact, and a step with infinite gradients does not happen."""
    run, plain = Regression(backend), Regression(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(6):
        run.optimizer.zero_grad()
        factor = torch.inf if step == 3 else 1.0
        scaler.scale(run.loss(step) * factor).backward()
        before = run.weights(), copy.deepcopy(run.optimizer.state_dict())
        scaler.step(run.optimizer)
        scaler.update()
        if step == 3:
            assert same(before, (run.weights(), run.optimizer.state_dict()))
            continue
        plain.optimizer.zero_grad()
        plain.loss(step).backward()
        plain.optimizer.step()
    assert scaler.get_scale() == 2.0**9
    assert same(run.weights(), plain.weights())
    assert run.optimizer.get_optimization_info()["features"]["nonfinite_skipped_steps"] == 0


@each_backend
def test_weights_are_averaged(backend):
    run = Regression(backend)
    averaged, schedule = AveragedModel(run.model), SWALR(run.optimizer, swa_lr=0.05)
    seen = []
    for step in range(4):
        run.optimizer.zero_grad()
        run.loss(step).backward()
        run.optimizer.step()
        schedule.step()
        averaged.update_parameters(run.model)
        seen.append(run.weights())
    for mean, values in zip(averaged.module.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(mean.detach(), torch.stack(values).mean(0))
        assert not torch.equal(values[0], values[-1])
    assert run.optimizer.param_groups[0]["lr"] > 0.01


@each_backend
def test_accelerate_accumulates_schedules_and_restores(backend, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    run, plain = Regression(backend), Regression(backend)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, 2, 0.5)
    model, optimizer, schedule = accelerator.prepare(run.model, run.optimizer, schedule)
    plain_schedule = torch.optim.lr_scheduler.StepLR(plain.optimizer, 2, 0.5)

    def train(steps: range) -> None:
        for step in steps:
            with accelerator.accumulate(model):
                accelerator.backward(run.loss(step))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    for step in range(8):
        (plain.loss(step) / 2).backward()
        if step % 2:
            plain.optimizer.step()
            plain_schedule.step()
            plain.optimizer.zero_grad()
    train(range(4))
    accelerator.save_state(str(tmp_path / "half"))
    train(range(4, 8))
    assert same(run.weights(), plain.weights())
    accelerator.load_state(str(tmp_path / "half"))
    train(range(4, 8))
    assert same(run.weights(), plain.weights())


@each_backend
def test_the_profiler_shows_steps_by_name(backend):
    run = Regression(backend)
    run.loss(0).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.optimizer.step()
        run.optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert "Optimizer.step#HinaAdamWOptimizer.step" in names
    assert "Optimizer.zero_grad#HinaAdamWOptimizer.zero_grad" in names
