"""How long a run is and where it begins, also after a resume with other epochs."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from library.training.errors import UserError
from library.training.options import Options
from library.training.plan import Plan, begin, plan_run
from library.training.state import Progress


def options(**values: Any) -> Options:
    return Options.from_values({"seed": 1, "max_train_steps": 400, **values})


def place(progress: Progress) -> tuple[int, int, int]:
    return progress.step, progress.epoch, progress.index


@pytest.mark.parametrize(
    ("values", "batches", "planned"),
    [
        ({}, 50, Plan(50, 400, 8)),
        ({"max_train_steps": 401}, 50, Plan(50, 401, 9)),
        ({"gradient_accumulation_steps": 4}, 50, Plan(13, 400, 31)),
        ({"max_train_epochs": 3}, 50, Plan(50, 150, 3)),
        ({"max_train_epochs": 3, "gradient_accumulation_steps": 4}, 50, Plan(13, 39, 3)),
    ],
)
def test_a_new_run(values: dict[str, Any], batches: int, planned: Plan) -> None:
    chosen = options(**values)
    start = begin(chosen, None, batches, num_processes=1)
    assert place(start) == (0, 0, 0)
    assert plan_run(chosen, start) == planned


def saved(step: int, epoch: int, index: int, batches: int = 50) -> Progress:
    return Progress(
        step=step, epoch=epoch, index=index, batches_per_epoch=batches, num_processes=1, seed=1
    )


def test_a_resumed_run_goes_on_inside_its_epoch() -> None:
    start = begin(options(), saved(310, 6, 10), 50, 1)
    assert place(start) == (310, 6, 10)
    assert plan_run(options(), start) == Plan(50, 400, 8)


@pytest.mark.parametrize(
    ("values", "batches", "epochs", "steps"),
    [
        ({}, 100, 7, 400),  # 100 steps are left: one longer epoch after the six that are done
        ({}, 25, 10, 400),
        ({"max_train_epochs": 8}, 100, 8, 500),
        ({"gradient_accumulation_steps": 2}, 50, 10, 400),
    ],
)
def test_epochs_of_another_length_after_a_resume(
    values: dict[str, Any], batches: int, epochs: int, steps: int
) -> None:
    """The count of steps and of epochs goes on; those to come have today's length."""
    chosen = options(**values)
    start = begin(chosen, saved(300, 6, 0), batches, 1)
    planned = plan_run(chosen, start)
    assert (planned.epochs, planned.steps) == (epochs, steps)


def test_a_begun_epoch_of_other_batches_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        start = begin(options(), saved(310, 6, 10), 25, 2)
    assert place(start) == (310, 6, 0)
    assert (start.batches_per_epoch, start.num_processes) == (25, 2)
    assert "epoch 7 starts anew" in caplog.text
    assert plan_run(options(), start) == Plan(25, 400, 10)


def test_another_seed_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    begin(options(), saved(300, 6, 0), 50, 1)
    assert not caplog.text
    start = begin(options(seed=2), saved(300, 6, 0), 50, 1)
    assert "--seed 1" in caplog.text
    assert "--seed 2" in caplog.text
    assert start.seed == 2


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"initial_step": 120}, (120, 2, 0)),
        ({"initial_step": 120, "skip_until_initial_step": True}, (120, 2, 20)),
        ({"initial_epoch": 3}, (100, 2, 0)),
        ({"initial_epoch": 1}, (0, 0, 0)),
        (
            {
                "initial_step": 30,
                "gradient_accumulation_steps": 2,
                "skip_until_initial_step": True,
            },
            (30, 1, 10),
        ),
    ],
)
def test_a_later_start(values: dict[str, Any], where: tuple[int, int, int]) -> None:
    assert place(begin(options(**values), None, 50, 1)) == where


def test_nothing_left_to_do() -> None:
    for progress in (saved(400, 8, 0), saved(450, 9, 0)):
        with pytest.raises(UserError, match="nothing is left to do"):
            plan_run(options(), begin(options(), progress, 50, 1))


def test_a_place_inside_a_step_goes_back_to_its_beginning() -> None:
    chosen = options(gradient_accumulation_steps=4)
    start = begin(chosen, saved(307, 6, 7), 50, 1)
    assert place(start) == (307, 6, 4)
    assert plan_run(chosen, start) == Plan(13, 400, 14)  # 12 steps of this epoch, then 81
