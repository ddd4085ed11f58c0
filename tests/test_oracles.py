"""Techniques against independent implementations: torch's AdamW and `pytorch_optimizer`.

Both sides get the same parameters and, whatever these become, the same gradients, so rounding
cannot feed on itself. A step then adds to a parameter p a rounding error of at most 2⁻²⁴·|p|, and
some 10·2⁻²⁴ of the step itself, which is about lr = 0.01: over 50 steps at most 3e-6 of |p|, and in
float64 2²⁹ times less: 6e-15. Errors are in units of a tensor's largest entry, as small entries may
be differences of large ones.

Without a counterpart in an installed package, and so in `test_techniques.py` alone: adaptive
gradient regularization, selective projection, pair scaling and the schedule of weight decay (but
that the last two leave parameters of no module alone is here).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from optimizers import NOTHING_ON, each_backend, hina, named, parameters
from torch import Tensor, nn

from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer

LR, BETAS, EPS, DECAY, STEPS = 0.01, (0.9, 0.99), 1e-3, 0.05, 50  # ε large enough to act
SHAPES = ((), (1,), (7,), (16, 24), (6, 5, 3, 3), (130, 70), (2, 1, 513))
COMMON: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14}

Oracle = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def start(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    """A slowly turning direction and noise, so that momentum agrees with most of it."""
    steady, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(100 + step)
    turned = 0.01 * math.cos(step / 20)
    return [
        (turned * torch.randn(s, generator=steady) + 0.02 * torch.randn(s, generator=noise)).to(
            dtype
        )
        for s in SHAPES
    ]


def train(make: Oracle, dtype: torch.dtype, steps: int = STEPS) -> list[Tensor]:
    """The parameters after some steps; `make` builds the optimizer."""
    params = start(dtype)
    optimizer = make(params)
    for step in range(steps):
        for p, grad in zip(params, gradients(step, dtype), strict=True):
            p.grad = grad
        if step == 0 and getattr(optimizer, "decays_from_the_second_step", False):
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0
        optimizer.step()
        for group in optimizer.param_groups:
            group["weight_decay"] = DECAY
    return [p.detach() for p in params]


def train_hina(backend: str, on: list[str], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    switches = {**NOTHING_ON, **dict.fromkeys(on, True), "optim_bits": 32}
    return train(lambda p: hina(named(*p), backend, **COMMON, **switches, **options), dtype)


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, in units of the largest entry of each tensor."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **COMMON, foreach=False)


def adopt(params: list[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    """ADOPT with clipping.

    The paper's update clips at (t−1)^¼, t being 1 at the step that only sets v; `clip_lambda` is
    asked with t, and its default would be one step ahead. It also decays the parameters in that
    first step, when the paper's and ours do nothing else than to set v.
    """
    library = pytest.importorskip("pytorch_optimizer")
    optimizer = library.ADOPT(
        params,
        **COMMON,
        weight_decouple=True,
        clip_lambda=lambda t: (t - 1) ** 0.25,
        foreach=False,
        **more,
    )
    optimizer.decays_from_the_second_step = True
    return optimizer


def cautious_adopt(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Its mask asks the normalised and clipped gradient, which has the gradient's own signs."""
    return adopt(params, cautious=True)


def grams(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return pytest.importorskip("pytorch_optimizer").Grams(params, **COMMON)


def cautious_adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdEMAMix without its slow momentum (`alpha=0`) is AdamW, and it has the cautious mask, with
    the paper's factor n/(Σmask + 1)."""
    return pytest.importorskip("pytorch_optimizer").AdEMAMix(
        params,
        **{**COMMON, "betas": (*BETAS, 0.9999)},
        alpha=0.0,
        weight_decouple=True,
        cautious=True,
        foreach=False,
    )


ORACLES: dict[str, tuple[list[str], Oracle]] = {
    "AdamW": ([], adamw),
    "ADOPT": (["use_adopt_stability"], adopt),
    "Grams": (["use_grams"], grams),
    "cautious AdamW": (["use_cautious"], cautious_adamw),
    "cautious ADOPT": (["use_adopt_stability", "use_cautious"], cautious_adopt),
}
each_oracle = pytest.mark.parametrize("name", ORACLES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@cache
def oracle(name: str, dtype: torch.dtype) -> list[Tensor]:
    return train(ORACLES[name][1], dtype)


@each_backend
@each_dtype
@each_oracle
def test_the_same_trajectory(backend, dtype, name):
    ours = train_hina(backend, ORACLES[name][0], dtype)
    assert distance(ours, oracle(name, dtype)) < TOLERANCE[dtype]


@each_dtype
def test_the_oracles_tell_techniques_apart(dtype):
    ends = [oracle(name, dtype) for name in ORACLES]
    for one, other in itertools.combinations(ends, 2):
        assert distance(one, other) > 1e-2


@each_backend
@each_dtype
@each_oracle
def test_the_same_trajectory_with_orthogonal_gradients(backend, dtype, name):
    """`OrthoGrad` around each of them.

    A tensor of one element has no direction orthogonal to itself: there it makes the gradient zero
    (or, below its threshold of rounding, what rounding left), and ours keeps it, so that such a
    tensor still learns. These are left out.
    """
    library = pytest.importorskip("pytorch_optimizer")
    switches, make = ORACLES[name]

    def wrapped(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        inner = make(params)
        outer = library.OrthoGrad(inner)
        outer.decays_from_the_second_step = hasattr(inner, "decays_from_the_second_step")
        return outer

    theirs = train(wrapped, dtype)
    ours = train_hina(backend, [*switches, "use_orthogonal_grad"], dtype)
    kept = [i for i, shape in enumerate(SHAPES) if math.prod(shape) > 1]
    ours, theirs, plain = ([some[i] for i in kept] for some in (ours, theirs, oracle(name, dtype)))
    assert distance(ours, theirs) < 2 * TOLERANCE[dtype]
    assert distance(theirs, plain) > 1e-2


@each_backend
@pytest.mark.parametrize("tam_beta", [0.5, 0.9])
def test_torque_aware_momentum_of_single_elements(backend, tam_beta):
    """`AdaTAM`, as far as it coincides.

    The paper's ŝ smooths the cosine of momentum and gradient, one number a tensor. AdaTAM keeps one
    number an element, of the product of the two, each normalised along the first dimension: only
    for a tensor of one element is that the cosine. It also does without 1 − β₁ and without bias
    correction, which a learning rate that changes with the step makes good (ε is too small to act).
    Ours keeps ŝ as a float32 number.
    """
    library = pytest.importorskip("pytorch_optimizer")
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (parameters(*torch.zeros(64, 1, dtype=torch.float64)) for _ in range(2))
    common = {"lr": LR, "betas": BETAS, "eps": 1e-14, "weight_decay": 0.0}
    switches = {**NOTHING_ON, "use_tam": True, "tam_beta": tam_beta}
    ending = [
        hina(named(*ours), backend, **common, **switches),
        library.AdaTAM(theirs, **common, decay_rate=tam_beta, foreach=False),
    ]
    for t in range(1, STEPS + 1):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(1, generator=generator, dtype=torch.float64) + 0.5
            other.grad = one.grad.clone()
        correction = (1 - BETAS[1] ** t) ** 0.5 / (1 - BETAS[0] ** t)
        ending[1].param_groups[0]["lr"] = LR * (1 - BETAS[0]) * correction
        for optimizer in ending:
            optimizer.step()
    got, expected = torch.stack(ours).detach(), torch.stack(theirs).detach()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@each_backend
@pytest.mark.parametrize(
    ("switch", "options"),
    [
        ("use_alora", {}),
        ("dynamic_weight_decay", {"wd_transition_steps": 5}),
        ("use_spd", {"spd_lambda": 0.0}),
    ],
)
def test_a_technique_that_has_nothing_to_do_leaves_adamw(backend, switch, options):
    """Parameters of no module have no pair and no schedule of decay, and λ = 0 pulls nowhere."""
    ours = train_hina(backend, [switch], torch.float32, **options)
    assert distance(ours, oracle("AdamW", torch.float32)) < TOLERANCE[torch.float32]


MODULES = {
    "x.lora_down.weight": (4, 60),
    "x.lora_up.weight": (50, 4),
    "plain.weight": (9, 40),
}


def combined(backend: str, on: tuple[bool, ...]) -> Tensor:
    """All parameters after a few steps with these switches.

    The gradients: most elements lead away from zero and few strongly towards it, so that a step
    goes away from the anchor although the gradient as a whole says otherwise (which is when
    selective projection acts), and noise turns some signs from step to step (which is when the
    cautious mask and Grams act).
    """
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in MODULES.items()}
    values["x.lora_up.weight"].zero_()  # where training starts
    params = dict(zip(values, parameters(*values.values()), strict=True))
    switches = dict(zip(HinaAdamWOptimizer.SWITCHES, on, strict=True))
    common = {"lr": LR, "weight_decay": 0.02, "wd_transition_steps": 1, "optim_bits": 32}
    optimizer = hina(params.items(), backend, **common, **switches)
    for _ in range(3):
        for p in params.values():
            noise, few = (torch.randn(p.shape, generator=generator) for _ in range(2))
            p.grad = torch.where(few > 1.3, 1.0, -0.02) * p.detach() + 0.01 * noise
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params.values()])


@pytest.mark.parametrize(
    ("backend", "counts"),
    [pytest.param("compiled", (8, 9), marks=pytest.mark.slow), ("eager", range(10))],
)
def test_every_switch_acts_in_every_combination(backend, counts):
    """All 512 are finite, and each differs from the nine that differ from it in one switch. As
    machine code, each takes seconds to compile: all, and all but one."""
    switches = HinaAdamWOptimizer.SWITCHES
    all_of_them = itertools.product((False, True), repeat=len(switches))
    ends = {on: combined(backend, on) for on in all_of_them if sum(on) in counts}
    for on, end in ends.items():
        assert end.isfinite().all(), on
        for i, switch in enumerate(switches):
            other = (*on[:i], True, *on[i + 1 :])
            if not on[i] and other in ends:
                assert (end - ends[other]).abs().max() > 1e-4 * LR, (switch, on)
