"""The CameAMP family in the trainer: C-Optim hears every loss, and a resumed run goes on alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import same_weights, train, write_dataset

pytestmark = pytest.mark.slow

ARGUMENTS = ["warmup_steps=4", "max_lr=2e-3", "lr_bump=1e-5", "context_window=10"]
# Not compiled: eight programs would take most of the time (test_cameamp_examples.py compiles).
ARGUMENTS += ["backend=eager"]


def optimizer_of(state: Path) -> dict[str, object]:
    (file,) = [path for path in state.iterdir() if path.name.startswith("optimizer")]
    saved: dict[str, object] = torch.load(file, weights_only=True)
    return saved


def test_c_optim_hears_every_loss_and_goes_on_where_it_was(tmp_path: Path) -> None:
    options = {
        "dataset_config": write_dataset(tmp_path / "data"),
        "optimizer_type": "Automagic_CameAMP_COptim8bit",
        "optimizer_args": ARGUMENTS,
        "max_train_steps": 8,
        "save_every_n_steps": 5,
        "save_state": True,
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(output_dir=whole, **options)
    middle = whole / "short-step00000005-state"
    known = optimizer_of(middle)["c_optim"]
    assert len(known["losses"]) == 5
    assert len(set(known["losses"])) == 5
    assert len(known["cosines"]) == 4, "the first step has no momentum to compare with"
    train(output_dir=resumed, resume=middle, **options)
    assert same_weights(whole / "short.safetensors", resumed / "short.safetensors")
    end = [optimizer_of(folder / "short-state")["c_optim"] for folder in (whole, resumed)]
    assert end[0] == end[1]
    assert len(end[0]["losses"]) == 8
    assert end[0]["multiplier"] != 1.0


def test_regularized_training_of_a_lokr(tmp_path: Path) -> None:
    """With a profile by a bare word, and convolutions among the layers."""
    result = train(
        dataset_config=write_dataset(tmp_path / "data"),
        network_module="networks.lokr",
        network_args=["factor=4", "conv_dim=4"],
        optimizer_type="automagic_cameamp_improved_8bit",
        optimizer_args=[*ARGUMENTS, "profile=quality_optimized", "regularization_interval=2"],
        output_dir=tmp_path / "out",
    )
    said = result.stdout + result.stderr
    assert "early warm-up until step 2, late until 4" in said
    assert "regularizers act every 2 steps" in said
    assert (tmp_path / "out" / "short.safetensors").exists()
