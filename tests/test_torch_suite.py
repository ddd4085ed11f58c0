"""What PyTorch's own test suite asks of an optimizer's steps, asked of HinaAdamW.

Modelled on `test/test_optim.py` of PyTorch: every configuration below goes through every test, as
its `OptimizerInfo` does there. Its container classes are not imported: they are private, need a
package of their own, and importing them forbids the whole process to set `torch.backends` flags.
State dicts and hooks are in `test_torch_suite_state.py`, memory and the tools of a training loop in
`test_torch_suite_use.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optimizers import (
    CASES,
    NOTHING_ON,
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
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW

Scheduler = Callable[[torch.optim.Optimizer], Any]
SCHEDULES: dict[str, list[Scheduler]] = {
    "constant": [],
    "step": [lambda o: StepLR(o, gamma=0.9, step_size=10)],
    "cosine": [lambda o: CosineAnnealingLR(o, 25)],
    "plateau": [ReduceLROnPlateau],
    "several": [
        lambda o: LinearLR(o, 0.4, total_iters=4),
        lambda o: ExponentialLR(o, 0.99),
        ReduceLROnPlateau,
    ],
}


def advance(schedulers: Sequence[Any], loss: Tensor) -> None:
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss.item())
        else:
            scheduler.step()


def problem(contiguous: bool = True) -> tuple[nn.Parameter, nn.Parameter, Callable[[], Tensor]]:
    """A weight, a bias, and the squared error that they make of one input."""
    weight, bias, x = drawn((10, 5, 2), (10, 2), (5,))
    weight, bias = nn.Parameter(weight[..., 0]), nn.Parameter(bias[..., 0])
    if contiguous:
        weight, bias = nn.Parameter(weight.data.clone()), nn.Parameter(bias.data.clone())
    assert weight.is_contiguous() == contiguous
    return weight, bias, lambda: (weight.mv(x) + bias).square().sum()


def minimise(optimizer: Any, loss_of: Callable[[], Tensor], steps: int, *make: Scheduler) -> float:
    """The share of the first loss that is left after some steps."""
    schedulers = [scheduler(optimizer) for scheduler in make]
    first = loss_of().item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        advance(schedulers, loss)
    return loss_of().item() / first


@each_backend
@each_case
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_loss_falls(backend, options, schedule, contiguous):
    weight, bias, loss_of = problem(contiguous)
    optimizer = hina(named(weight, bias), backend, **options)
    assert minimise(optimizer, loss_of, 20, *SCHEDULES[schedule]) < 0.995


@each_backend
@each_case
def test_the_minimum_is_reached(backend, options):
    weight, bias, loss_of = problem()
    groups = [{"params": [("weight", weight)]}, {"params": [("bias", bias)], "lr": 0.1}]
    optimizer = hina(groups, backend, **{**options, "lr": 0.2})
    assert minimise(optimizer, loss_of, 200, lambda o: CosineAnnealingLR(o, 200)) < 0.01


@each_backend
@each_case
def test_a_group_has_its_own_learning_rate(backend, options):
    weight, bias, loss_of = problem()
    (other,) = parameters(*drawn((300,), seed=5))
    start = other.detach().clone()
    groups = [{"params": named(weight, bias), "lr": 0.01}, {"params": [("other", other)]}]
    optimizer = hina(groups, backend, **{**options, "lr": 1e-28})
    assert minimise(optimizer, lambda: loss_of() + 1e-6 * other.square().sum(), 20) < 0.97
    assert torch.equal(other, start)


@each_backend
def test_a_group_has_its_own_weight_decay(backend):
    kept, decayed = parameters(*drawn((40,), (40,)))
    start = decayed.detach().clone(), kept.detach().clone()
    groups = [
        {"params": [("kept", kept)], "weight_decay": 0.0},
        {"params": [("decayed", decayed)], "weight_decay": 0.1},
    ]
    optimizer = hina(groups, backend, **NOTHING_ON, lr=0.01)
    for _ in range(10):
        kept.grad, decayed.grad = torch.zeros(40), torch.zeros(40)
        optimizer.step()
    torch.testing.assert_close(decayed.detach(), start[0] * (1 - 0.001) ** 10, rtol=2e-6, atol=0)
    assert torch.equal(kept, start[1])


@each_backend
@pytest.mark.parametrize("case", ["8-bit state", "all on", "nothing on"])
def test_groups_are_as_good_as_optimizers_of_their_own(backend, case):
    own = [
        {"lr": 0.1, "betas": (0.9, 0.99)},
        {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.2},
        {"betas": (0.0, 0.5)},
    ]
    options = {**CASES[case], "min_8bit_size": 0}
    start = drawn((30, 20), (7,), (300,))
    one, many = named(*parameters(*start)), named(*parameters(*start))
    groups = [{"params": [item], **some} for item, some in zip(one, own, strict=True)]
    single = [hina([m], backend, **{**options, **o}) for m, o in zip(many, own, strict=True)]
    together = follow([hina(groups, backend, **options)], [p for _, p in one])
    assert same(together, follow(single, [p for _, p in many]))


@each_backend
@each_case
def test_a_tensor_as_learning_rate_is_its_value(backend, options):
    (number,), (tensor,) = parameters(*drawn((9, 5))), parameters(*drawn((9, 5)))
    lr = torch.tensor(0.05)
    optimizers = [
        hina(named(number), backend, **{**options, "lr": lr.item()}),
        hina(named(tensor), backend, **{**options, "lr": lr}),
    ]
    lr.fill_(7.0)  # what the tensor holds later does not act
    assert same(follow(optimizers[:1], [number]), follow(optimizers[1:], [tensor]))


def against_adamw(backend: str, prepare: Callable[[Any, Sequence[Tensor]], Any]) -> None:
    """HinaAdamW with nothing on and AdamW, treated alike, step alike.

    Args:
        prepare: of an optimizer and its parameters, what to do before each step.
    """
    ends = []
    for make in (
        lambda params: hina(params, backend, **CASES["nothing on"], lr=0.01),
        lambda params: torch.optim.AdamW([tensor for _, tensor in params], lr=0.01),
    ):
        params = parameters(*drawn((20, 30), (7,), (4, 3, 2, 2)))
        optimizer = make(named(*params))
        ends.append(follow([optimizer], params, 30, prepare(optimizer, params)))
    for ours, theirs in zip(*ends, strict=True):
        # 30 steps of one rounding each, 2⁻²⁴ of values up to 4.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=5e-6)


SCHEDULERS_THAT_ACT: dict[str, Scheduler] = {
    "cosine": lambda o: CosineAnnealingLR(o, 30),
    "jumps": lambda o: LambdaLR(o, lambda step: (0.1, 0.0, 3.0)[step % 3]),
    "lr and beta": lambda o: OneCycleLR(o, max_lr=0.05, total_steps=31),  # cycles β₁ as well
    "plateau": lambda o: ReduceLROnPlateau(o, patience=1),
}


@each_backend
@pytest.mark.parametrize("name", SCHEDULERS_THAT_ACT)
def test_schedulers_act_as_on_adamw(backend, name):
    def prepare(optimizer, params):
        scheduler = SCHEDULERS_THAT_ACT[name](optimizer)

        def change(step: int) -> None:
            if step:
                advance([scheduler], torch.tensor(1.0))

        return change

    against_adamw(backend, prepare)


@each_backend
def test_options_may_be_changed_between_steps(backend):
    def prepare(optimizer, params):
        changed = [{"lr": 0.03}, {"betas": (0.5, 0.9)}, {"eps": 0.1}, {"weight_decay": 0.3}]
        return lambda step: optimizer.param_groups[0].update(changed[step // 5 % 4])

    against_adamw(backend, prepare)


@each_backend
def test_layers_may_be_frozen_and_gradients_missing(backend):
    def prepare(optimizer, params):
        def change(step: int) -> None:
            params[0].requires_grad_(not 3 <= step < 6)
            if step == 8:
                optimizer.zero_grad()
            if step % 4 == 1:
                params[1].grad = None

        return change

    against_adamw(backend, prepare)


@each_backend
def test_storage_may_be_exchanged_between_steps(backend):
    """As by `module.to`, `vector_to_parameters` or a checkpoint: no address is remembered."""

    def prepare(optimizer, params):
        def change(step: int) -> None:
            if step % 5 == 1:
                for p in params:
                    p.data = p.data.clone() * 1.5
            if step % 5 == 3:
                vector = nn.utils.parameters_to_vector(params)
                nn.utils.vector_to_parameters(vector + 0.1, params)
            if step % 5 == 4:
                with torch.no_grad():
                    params[1].copy_(torch.ones(7))

        return change

    against_adamw(backend, prepare)


@each_backend
@each_case
def test_nothing_moves_without_gradients(backend, options):
    params = drawn((2, 3), (300,))  # tensors that never get one, as in PyTorch's own test
    start = [p.clone() for p in params]
    optimizer = hina(named(*params), backend, **options)
    assert optimizer.step(lambda: torch.tensor([1.0])) == 1
    assert same(params, start)


@each_backend
@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("still", ["gradient", "lr"])
def test_nothing_moves_for_zero_gradients_or_a_zero_learning_rate(backend, options, dtype, still):
    params = parameters(*drawn((5, 1), (40, 8), dtype=dtype))
    start = [p.detach().clone() for p in params]
    optimizer = hina(named(*params), backend, **options)
    optimizer.param_groups[0]["weight_decay" if still == "gradient" else "lr"] = 0.0
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p) if still == "gradient" else torch.randn_like(p)
        optimizer.step()
    assert same([p.detach() for p in params], start)


@each_backend
@each_case
def test_empty_tensors_and_groups_do_no_harm(backend, options):
    empty, cube, alone, full = parameters(
        torch.zeros(0), torch.zeros(3, 0, 2), torch.zeros(0), *drawn((6,))
    )
    groups = [{"params": []}, {"params": [("cube", cube), ("full", full), ("empty", empty)]}]
    optimizers = [hina(groups, backend, **options), hina(named(alone), backend, **options)]
    start = full.detach().clone()
    follow(optimizers, [empty, cube, alone, full], 2)
    assert not torch.equal(full, start)


@each_backend
@each_case
def test_equal_tensors_stay_equal(backend, options):
    """With float32 state; 8-bit state is rounded with noise that each tensor has of its own."""
    (start,) = drawn((30, 20))
    params = parameters(start, start)
    optimizer = hina(named(*params), backend, **{**options, "optim_bits": 32})
    for seed in range(4):
        (grad,) = drawn((30, 20), seed=seed)
        params[0].grad, params[1].grad = grad, grad.clone()
        optimizer.step()
    assert torch.equal(*params)
    assert not torch.equal(params[0], start)


@each_backend
@each_case
def test_each_dtype_steps_as_if_alone(backend, options):
    if options.get("cls") is AdaptiveHinaAdamW:  # that compares parameters with one another
        options = {**options, "use_dynamic_adaptation": False}
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    start = [tensor for dtype in dtypes for tensor in drawn((4, 90), dtype=dtype)]
    together, alone = named(*parameters(*start)), named(*parameters(*start))
    mixed = follow([hina(together, backend, **options)], [p for _, p in together])
    single = [hina([item], backend, **options) for item in alone]
    assert same(mixed, follow(single, [p for _, p in alone]))
    assert [p.dtype for p in mixed] == dtypes


@each_backend
@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_the_default_dtype_changes_nothing(backend, default):
    ends = []
    for dtype in (torch.float32, default):
        params = parameters(*drawn((30, 20), (7,)))
        torch.set_default_dtype(dtype)
        try:
            optimizer = hina(named(*params), backend, optim_bits=32, lr=0.1)
            ends.append(follow([optimizer], params))
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
