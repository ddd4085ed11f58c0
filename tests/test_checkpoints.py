"""Names, retention and refusal of bad weights, with real files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.training.checkpoints import Checkpoints
from library.training.errors import UserError
from library.training.options import Options


def make(tmp_path: Path, weights: torch.Tensor | None = None, **settings: object) -> Checkpoints:
    options = Options(output_dir=str(tmp_path), output_name="cat")
    for name, value in settings.items():
        setattr(options, name, value)
    tensor = torch.ones(2) if weights is None else weights

    def save_state(path: Path) -> None:
        path.mkdir()

    return Checkpoints(
        options=options,
        state_dict=lambda dtype: {"a.lora_up.weight": tensor.to(dtype or tensor.dtype)},
        metadata=lambda tensors, step, epoch: {"ss_steps": str(step), "ss_epoch": str(epoch)},
        save_state=save_state,
        total_epochs=10,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_steps_are_saved_and_the_old_removed_as_in_stock(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, save_every_n_steps=10, save_last_n_steps=30)
    for step in range(1, 61):
        checkpoints.at_step(step, epoch=1)
    # Stock's own example: with every 10 and last 30, step 50 removes step 10 and keeps 20.
    assert names(tmp_path) == [f"cat-step{step:08d}.safetensors" for step in (30, 40, 50, 60)]


def test_epochs_are_saved_but_the_last_is_left_to_the_end(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, save_every_n_epochs=1, save_last_n_epochs=2, save_state=True)
    for epoch in range(1, 11):
        checkpoints.at_epoch(step=epoch * 5, epoch=epoch)
    checkpoints.at_end(50, 10)
    assert names(tmp_path) == [
        "cat-000008-state",
        "cat-000008.safetensors",
        "cat-000009-state",
        "cat-000009.safetensors",
        "cat-state",
        "cat.safetensors",
    ]


def test_states_have_their_own_retention(tmp_path: Path) -> None:
    checkpoints = make(
        tmp_path,
        save_every_n_steps=1,
        save_state=True,
        save_last_n_steps=1,
        save_last_n_steps_state=3,
    )
    for step in range(1, 9):
        checkpoints.at_step(step, epoch=1)
    kept = [name for name in names(tmp_path) if name.endswith("-state")]
    assert kept == [f"cat-step{step:08d}-state" for step in (5, 6, 7, 8)]


def test_files_of_an_earlier_run_stay(tmp_path: Path) -> None:
    (tmp_path / "cat-step00000001.safetensors").touch()
    checkpoints = make(tmp_path, save_every_n_steps=1, save_last_n_steps=1)
    for step in (8, 9, 10):
        checkpoints.at_step(step, epoch=1)
    assert names(tmp_path)[0] == "cat-step00000001.safetensors"


def test_epoch_ratio(tmp_path: Path) -> None:
    assert make(tmp_path, save_n_epoch_ratio=3).epoch_interval() == 3
    assert make(tmp_path, save_n_epoch_ratio=30).epoch_interval() == 1
    assert make(tmp_path).epoch_interval() is None


@pytest.mark.parametrize(
    ("precision", "dtype"), [(None, "F32"), ("fp16", "F16"), ("bf16", "BF16"), ("float", "F32")]
)
def test_precision_and_metadata_reach_the_file(
    tmp_path: Path, precision: str | None, dtype: str
) -> None:
    path = make(tmp_path, save_precision=precision).at_end(12, 3)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"ss_steps": "12", "ss_epoch": "3"}
        assert file.get_slice("a.lora_up.weight").get_dtype() == dtype


def test_pickled_formats(tmp_path: Path) -> None:
    path = make(tmp_path, save_model_as="pt").at_end(1, 1)
    assert path.name == "cat.pt"
    assert torch.load(path)["a.lora_up.weight"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_never_written(tmp_path: Path, value: float) -> None:
    good = make(tmp_path).at_end(1, 1)
    before = good.read_bytes()
    with pytest.raises(UserError, match=r"a\.lora_up\.weight"):
        make(tmp_path, weights=torch.tensor([1.0, value])).at_end(2, 1)
    assert good.read_bytes() == before


def test_weights_that_overflow_only_in_half_precision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save_precision"):
        make(tmp_path, weights=torch.tensor([1e6]), save_precision="fp16").at_end(1, 1)
