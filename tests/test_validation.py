"""The validation loss is a mean over pictures, whatever batches and processes they fall into."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from picture_folders import options_for, write_folder
from runs import run_twice

from library.training.data import TrainingData
from library.training.samples import Batch
from library.training.validation import Validation


class OnDevice(torch.Tensor):
    """Losses as on a device without float64, such as Apple's."""

    def double(self) -> Any:
        raise TypeError("this device has no float64")

    def cpu(self, *args: Any, **kwargs: Any) -> Any:
        return self.as_subclass(torch.Tensor)


class ByNumber:
    """An objective whose loss of the picture 03.png is 3, plus a millionth of the timestep."""

    schedule = SimpleNamespace(alphas_cumprod=torch.ones(1000))

    def __call__(self, batch: Batch, timesteps: torch.Tensor) -> torch.Tensor:
        numbers = [float(Path(path).stem) for path in batch.paths]
        return (torch.tensor(numbers) + timesteps / 1e6).as_subclass(OnDevice)


def validation(folder: Path, **changes: Any) -> Validation:
    """Nine of ten pictures are held out."""
    options = options_for(folder, validation_split=0.9, max_data_loader_n_workers=0, **changes)
    held_out = TrainingData.open(options)[1]
    assert held_out is not None
    assert len(held_out.records) == 9
    return Validation(options, Accelerator(), held_out)


def expected(each: Validation) -> float:
    """What the mean is, at timesteps 200, 400, 600 and 800."""
    numbers = [float(Path(record.path).stem) for record in each.data.records]
    return sum(numbers) / len(numbers) + 500e-6


@pytest.mark.parametrize("batch_size", [1, 4, 8, 9])
def test_each_picture_counts_once(tmp_path: Path, batch_size: int) -> None:
    write_folder(tmp_path / "1_cat", 10)
    each = validation(tmp_path, train_batch_size=batch_size)
    objective: Any = ByNumber()
    assert each.loss(objective) == pytest.approx(expected(each), rel=1e-6)


def test_as_many_batches_as_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path / "1_cat", 10)
    objective: Any = ByNumber()
    part = validation(tmp_path, train_batch_size=4, max_validation_steps=2)
    first = [float(Path(record.path).stem) for record in part.data.records[:8]]
    assert part.loss(objective) == pytest.approx(sum(first) / 8 + 500e-6, rel=1e-6)


@pytest.mark.slow
def test_two_processes_give_the_value_of_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "1_cat", 10)  # the ninth picture's batch is filled up with copies
    script = tmp_path / "validate.py"
    script.write_text(
        f"""
from pathlib import Path
from test_validation import ByNumber, expected, validation

each = validation(Path({str(tmp_path)!r}), train_batch_size=2)
assert each.accelerator.num_processes == 2
loss = each.loss(ByNumber())
assert abs(loss - expected(each)) < 1e-5, (loss, expected(each))
each.accelerator.end_training()
"""
    )
    run_twice(script, ACCELERATE_USE_CPU="True")
