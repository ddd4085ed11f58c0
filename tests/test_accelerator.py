"""What of accelerate needed a hand: lone processes, and float16 gradients (`--full_fp16`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from library.training.accelerator import make_accelerator, take_float16_gradients
from library.training.errors import UserError
from library.training.options import Options


@pytest.fixture
def _new_process() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_new_process")
def test_processes_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--num_processes 2 --cpu"):
        make_accelerator(Options())


@pytest.mark.parametrize("factor", [1.0, float("inf")])
def test_float16_gradients_are_unscaled_and_overflow_is_seen(factor: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((parameter.float() * factor).sum()).backward()
    with pytest.raises(ValueError, match="FP16 gradients"):
        scaler.unscale_(optimizer)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    take_float16_gradients(scaler)
    scaler.scale(torch.zeros(()))  # makes the scale
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    skipped = factor == float("inf")
    assert parameter.tolist() == ([1.0] * 3 if skipped else [0.5] * 3)
