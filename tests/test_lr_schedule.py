"""The schedules against their formulas, and what is said about wrong options."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from library.training.errors import UserError
from library.training.lr_schedule import (
    check_lr_scheduler,
    get_scheduler_fix,
    make_lr_scheduler,
    step_count,
)
from library.training.options import Options

BASE = 0.5
STEPS = 40


def optimizer(kind: Callable[..., Optimizer] = torch.optim.SGD, groups: int = 1) -> Optimizer:
    parameters = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(groups)]
    return kind(parameters, lr=BASE)


def factors(options: Options, steps: int = STEPS) -> list[float]:
    """The learning rate of each step over the base rate."""
    opt = optimizer()
    schedule = make_lr_scheduler(options, opt, steps)
    rates = []
    for _ in range(steps):
        rates.append(opt.param_groups[0]["lr"] / BASE)
        opt.step()
        schedule.step()
    return rates


def progress(step: int, warmup: int) -> float:
    return (step - warmup) / (STEPS - warmup)


FORMULAS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": ({"lr_warmup_steps": 0}, lambda step: 1.0),
    "constant_with_warmup": ({}, lambda step: 1.0),
    "linear": ({}, lambda step: 1 - progress(step, 8)),
    "cosine": ({}, lambda step: (1 + math.cos(math.pi * progress(step, 8))) / 2),
    "cosine_with_restarts": (
        {"lr_scheduler_num_cycles": 3},
        lambda step: (1 + math.cos(math.pi * (3 * progress(step, 8) % 1))) / 2,
    ),
    "polynomial": (
        {"lr_scheduler_power": 2.0},
        lambda step: (BASE - 1e-7) / BASE * (1 - progress(step, 8)) ** 2 + 1e-7 / BASE,
    ),
    "inverse_sqrt": (
        {"lr_scheduler_timescale": 5},
        lambda step: 1 / math.sqrt((step + 5 - 8) / 5),
    ),
    "cosine_with_min_lr": (
        {"lr_scheduler_min_lr_ratio": 0.2},
        lambda step: 0.2 + 0.8 * (1 + math.cos(math.pi * progress(step, 8))) / 2,
    ),
    "warmup_stable_decay": (
        {"lr_decay_steps": 10, "lr_scheduler_min_lr_ratio": 0.1},
        lambda step: (
            1.0 if step < 30 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 30) / 10)) / 2
        ),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_named_schedules(name: str) -> None:
    more, after_warmup = FORMULAS[name]
    options = Options(**({"lr_scheduler": name, "lr_warmup_steps": 8} | more))
    for step, factor in enumerate(factors(options)):
        warmup = int(options.lr_warmup_steps)
        expected = after_warmup(step) if step >= warmup else step / warmup
        if name == "warmup_stable_decay" and step < warmup:
            expected = 0.1 + 0.9 * expected  # this one rises from its minimum
        assert factor == pytest.approx(expected, abs=1e-6), step


def test_piecewise_constant() -> None:
    options = Options(
        lr_scheduler="piecewise_constant", lr_scheduler_args=["step_rules='1:10,0.1:20,0.005'"]
    )
    got = factors(options)
    assert got == pytest.approx([1.0] * 10 + [0.1] * 10 + [0.005] * 20)


def test_warmup_and_decay_as_a_share_of_the_run() -> None:
    by_share = Options(lr_scheduler="warmup_stable_decay", lr_warmup_steps=0.2, lr_decay_steps=0.25)
    by_steps = Options(lr_scheduler="warmup_stable_decay", lr_warmup_steps=8, lr_decay_steps=10)
    assert factors(by_share) == factors(by_steps)
    assert [step_count(value, 40) for value in (0, 0.1, 0.99, 1, 3.0)] == [0, 4, 39, 1, 3]


def test_groups_keep_their_own_rates() -> None:
    opt = optimizer(groups=2)
    opt.param_groups[1]["lr"] = BASE / 10
    schedule = make_lr_scheduler(Options(lr_scheduler="linear"), opt, 10)
    for _ in range(5):
        opt.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([BASE / 2, BASE / 20])


def test_a_torch_schedule_by_name_and_by_path() -> None:
    for name in ("StepLR", "torch.optim.lr_scheduler.StepLR"):
        options = Options(lr_scheduler_type=name, lr_scheduler_args=["step_size=10", "gamma=0.5"])
        assert factors(options) == pytest.approx([0.5 ** (step // 10) for step in range(STEPS)])


def test_state_goes_on_where_it_was() -> None:
    options = Options(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=2)
    whole = factors(options)
    opt = optimizer()
    first = make_lr_scheduler(options, opt, STEPS)
    for _ in range(17):
        opt.step()
        first.step()
    again = make_lr_scheduler(options, optimizer(), STEPS)
    again.load_state_dict(first.state_dict())
    assert again.get_last_lr() == pytest.approx([whole[17] * BASE])


def test_stock_entry_point_counts_the_steps_of_all_processes() -> None:
    options = Options(lr_scheduler="linear", max_train_steps=10)
    schedule = get_scheduler_fix(options, optimizer(), num_processes=2)
    for _ in range(10):
        schedule.optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([BASE / 2])


class SomeScheduleFree(torch.optim.SGD):
    """Only its name matters here."""


def test_schedule_free_optimizers_keep_their_rate(caplog: pytest.LogCaptureFixture) -> None:
    opt = optimizer(SomeScheduleFree)
    with caplog.at_level(logging.WARNING):
        schedule = make_lr_scheduler(Options(lr_scheduler="cosine"), opt, 4)
    for _ in range(4):
        opt.step()
        schedule.step()
    assert schedule.get_last_lr() == [BASE]
    assert "left out" in caplog.text


def test_adafactor_reports_its_own_rate() -> None:
    from transformers.optimization import Adafactor

    opt = Adafactor([torch.zeros(3, requires_grad=True)], scale_parameter=False)
    options = Options(lr_scheduler="adafactor:0.02", optimizer_type="Adafactor")
    schedule = make_lr_scheduler(options, opt, 4)
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    assert schedule.get_last_lr() == [0.02]
    opt.step()
    schedule.step()
    assert schedule.get_lr()[0] == pytest.approx(1e-2)  # its relative step at first
    wrong = Options(lr_scheduler="adafactor:0.02", optimizer_type="AdamW")
    assert "Adafactor only" in check_lr_scheduler(wrong)[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr_scheduler": "cosin"}, "Did you mean 'cosine'?"),
        ({"lr_scheduler": "cosine:3"}, "no such schedule"),
        ({"lr_scheduler": "adafactor:fast", "optimizer_type": "Adafactor"}, "adafactor:1e-4"),
        (
            {"lr_scheduler": "adafactor", "optimizer_type": "torch.optim.Adafactor"},
            "for --optimizer_type Adafactor only",
        ),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "constant_with_warmup"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "--lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_args": ["num_cycle=2"]},
            "Did you mean 'num_cycles'?",
        ),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["num_cycles"]}, "key=value"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["a=1:10"]}, "cannot be read"),
        ({"lr_scheduler_type": "StepLRR"}, "Did you mean 'StepLR'?"),
        ({"lr_scheduler_type": "StepLR"}, "needs step_size"),
        (
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_sise=2"]},
            "Did you mean 'step_size'?",
        ),
        ({"lr_scheduler_type": "no_such_package.Schedule"}, "No module named"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "metric"),
        ({"lr_scheduler_type": "ConstantLR", "lr_warmup_steps": 2}, "warm-up"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], said: str) -> None:
    problems = check_lr_scheduler(Options(**options))
    assert said in "\n".join(problems)
    with pytest.raises(UserError, match=r"\S"):
        make_lr_scheduler(Options(**options), optimizer(), STEPS)


@pytest.mark.parametrize("name", [*FORMULAS, "piecewise_constant"])
def test_right_options_pass_the_check(name: str) -> None:
    more = FORMULAS.get(name, ({"lr_scheduler_args": ["step_rules='1:3,0.5'"]}, None))[0]
    assert check_lr_scheduler(Options(**({"lr_scheduler": name} | more))) == []


def test_more_warmup_and_decay_than_steps() -> None:
    options = Options(lr_scheduler="warmup_stable_decay", lr_warmup_steps=30, lr_decay_steps=20)
    with pytest.raises(UserError, match="more than the run's 40 steps"):
        make_lr_scheduler(options, optimizer(), STEPS)


def test_options_without_effect_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    options = Options(lr_scheduler="linear", lr_scheduler_power=2, lr_scheduler_num_cycles=3)
    with caplog.at_level(logging.WARNING):
        make_lr_scheduler(options, optimizer(), STEPS)
    assert "lr_scheduler_power has no effect" in caplog.text
    assert "lr_scheduler_num_cycles has no effect" in caplog.text


def test_adafactor_leaves_no_use_for_the_options_of_another_schedule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers.optimization import Adafactor

    opt = Adafactor([torch.zeros(3, requires_grad=True)])
    options = Options(
        lr_scheduler="cosine_with_restarts",
        optimizer_type="Adafactor",
        lr_warmup_steps=5,
        lr_scheduler_num_cycles=3,
        lr_scheduler_args=["last_epoch=-1"],
        learning_rate=0.03,
    )
    with caplog.at_level(logging.WARNING):
        schedule = make_lr_scheduler(options, opt, STEPS)
    assert schedule.get_last_lr() == [0.03]
    for name in ("lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_args"):
        assert f"--{name} has no effect on the schedule adafactor" in caplog.text


def test_arguments_override_the_options() -> None:
    options = Options(lr_scheduler="polynomial", lr_scheduler_args=["power=3", "lr_end=0.0"])
    assert factors(options)[20] == pytest.approx(0.5**3)


def test_stock_namespaces_work() -> None:
    args = SimpleNamespace(**vars(Options(lr_scheduler="linear", max_train_steps=4)))
    assert get_scheduler_fix(args, optimizer(), 1).get_last_lr() == [BASE]
