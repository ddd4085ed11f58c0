"""Whole runs in this process, on the tiny model: what goes wrong, and what options change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import ROOT, same_weights, words, write_dataset
from safetensors import safe_open
from safetensors.torch import load_file

import sdxl_train_network
import train_network

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _as_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps it for a process


def run(tmp_path: Path, **options: object) -> int:
    """A short run in `tmp_path`, the same data each time."""
    folder = tmp_path / "data"
    dataset = folder / "dataset.toml" if folder.exists() else write_dataset(folder)
    return train_network.main(words(dataset_config=dataset, output_dir=tmp_path, **options))


def history(state: Path) -> dict[str, list[float]]:
    series = json.loads((state / "progress.json").read_text())["history"]["series"]
    return {name: columns["values"] for name, columns in series.items()}


def test_divergence_stops_the_run_and_keeps_the_last_good_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"optimizer_type": "AdamW", "learning_rate": 1e20, "save_every_n_steps": 1}
    assert run(tmp_path, max_train_steps=20, **options) == 2
    said = capsys.readouterr().err
    assert "training stopped at step" in said
    assert ".png" in said
    assert not (tmp_path / "short.safetensors").exists()
    saved = sorted(tmp_path.glob("short-step*.safetensors"))
    assert saved
    assert all(tensor.isfinite().all() for tensor in load_file(saved[-1]).values())


def test_a_finished_state_has_nothing_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, save_state_on_train_end=True) == 0
    before = (tmp_path / "short.safetensors").read_bytes()
    assert run(tmp_path, resume=tmp_path / "short-state") == 2
    assert "nothing is left to do" in capsys.readouterr().err
    assert (tmp_path / "short.safetensors").read_bytes() == before


def test_accumulation_over_a_whole_epoch_is_one_step_an_epoch(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 4, "save_state_on_train_end": True}
    assert run(tmp_path, max_train_epochs=3, **options) == 0
    progress = json.loads((tmp_path / "short-state" / "progress.json").read_text())
    assert (progress["step"], progress["epoch"], progress["index"]) == (3, 3, 0)


def test_a_resume_with_longer_epochs_trains_to_the_end(tmp_path: Path) -> None:
    """Four steps an epoch become two by accumulation: five are left, three epochs of them."""
    options = {"save_state": True, "save_every_n_steps": 4, "max_train_steps": 9}
    assert run(tmp_path, output_name="first", **options) == 0
    state = tmp_path / "first-step00000004-state"
    again = {"gradient_accumulation_steps": 2, "output_name": "second", "resume": state}
    assert run(tmp_path, **options, **again) == 0
    progress = json.loads((tmp_path / "second-state" / "progress.json").read_text())
    assert (progress["step"], progress["epoch"], progress["index"]) == (9, 3, 2)
    assert len(progress["recent_losses"]) == 2  # of an epoch's two steps


def test_a_resume_takes_the_seed_that_the_first_run_drew(tmp_path: Path) -> None:
    options = {"seed": None, "save_state": True, "save_every_n_steps": 2}
    assert run(tmp_path, output_name="whole", **options) == 0
    state = tmp_path / "whole-step00000002-state"
    assert run(tmp_path, output_name="rest", resume=state, **options) == 0
    assert same_weights(tmp_path / "whole.safetensors", tmp_path / "rest.safetensors")


def test_a_resume_with_another_optimizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, save_state_on_train_end=True) == 0
    options = {"optimizer_type": "AdamW", "max_train_steps": 8}
    assert run(tmp_path, resume=tmp_path / "short-state", **options) == 2
    said = capsys.readouterr().err
    refusal = said[said.index("error: --resume") :]  # the log before it names both as well
    assert "HinaAdamWOptimizer" in refusal
    assert "torch.optim.adamw.AdamW" in refusal


def test_the_last_step_ends_its_epoch(tmp_path: Path) -> None:
    """One picture is held out, the other six make epochs of three steps."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat --w 64 --h 64 --s 1\n")
    options = {"sample_prompts": prompts, "sample_every_n_epochs": 1, "validation_split": 0.1}
    assert run(tmp_path, max_train_steps=5, save_state_on_train_end=True, **options) == 0
    assert len(list((tmp_path / "sample").glob("short_e00000[12]_*.png"))) == 2
    assert len(history(tmp_path / "short-state")["loss/validation/epoch_average"]) == 2
    with safe_open(tmp_path / "short.safetensors", "pt") as file:
        assert file.metadata()["ss_epoch"] == file.metadata()["ss_num_epochs"] == "2"


def test_norms_of_gradients_and_weights_are_logged(tmp_path: Path) -> None:
    for name, limit in (("clipped", 1e-3), ("free", 0)):
        options = {"output_name": name, "max_grad_norm": limit, "optimizer_type": "SGDNesterov"}
        assert run(tmp_path, save_state_on_train_end=True, **options) == 0
    clipped, free = (history(tmp_path / f"{name}-state") for name in ("clipped", "free"))
    assert len(free["norm/weights"]) == len(free["norm/gradient"]) == 4
    assert not same_weights(tmp_path / "clipped.safetensors", tmp_path / "free.safetensors")
    # Before clipping, and the same at the first step.
    assert clipped["norm/gradient"][0] == free["norm/gradient"][0] > 1e-3
    trained = load_file(tmp_path / "free.safetensors")
    norms = [w.double().norm() for name, w in trained.items() if not name.endswith("alpha")]
    assert free["norm/weights"][-1] == pytest.approx(float(torch.stack(norms).norm()), rel=1e-5)


def test_two_runs_are_the_same_and_another_seed_is_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(tmp_path, output_name=name, seed=seed) == 0
    assert same_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not same_weights(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


def test_the_largest_seed_of_all_trains(tmp_path: Path) -> None:
    options = {"seed": 2**63 - 1, "validation_seed": 2**63 - 1, "validation_split": 0.3}
    assert run(tmp_path, max_train_steps=1, **options) == 0
    with safe_open(tmp_path / "short.safetensors", "pt") as file:
        assert file.metadata()["ss_seed"] == str(2**63 - 1)


def test_validation_watches_pictures_that_are_not_trained_on(tmp_path: Path) -> None:
    options = {"validation_split": 0.3, "validate_every_n_steps": 2}
    assert run(tmp_path, save_state_on_train_end=True, max_train_steps=6, **options) == 0
    series = history(tmp_path / "short-state")
    assert len(series["loss/validation/step_average"]) == 3
    with safe_open(tmp_path / "short.safetensors", "pt") as file:
        assert file.metadata()["ss_num_validation_images"] == "2"


def test_validation_of_unchanged_weights_is_the_same_each_time(tmp_path: Path) -> None:
    options = {"validation_split": 0.3, "validate_every_n_steps": 1, "learning_rate": 1e-30}
    assert run(tmp_path, optimizer_type="SGDNesterov", save_state_on_train_end=True, **options) == 0
    losses = history(tmp_path / "short-state")["loss/validation/step_average"]
    assert len(losses) == 4
    assert len(set(losses)) == 1


def test_bfloat16_and_checkpointing_train(tmp_path: Path) -> None:
    options = {"mixed_precision": "bf16", "full_bf16": True, "gradient_checkpointing": True}
    assert run(tmp_path, **options) == 0
    tensors = load_file(tmp_path / "short.safetensors")
    assert any(value.any() for name, value in tensors.items() if "lora_up" in name)


@pytest.mark.parametrize(
    "optimizer", ["AdamW", "Lion", "Prodigy", "AdamWScheduleFree", "AdaFactor"]
)
def test_stock_optimizers_train_and_resume(tmp_path: Path, optimizer: str) -> None:
    pytest.importorskip({"Lion": "lion_pytorch", "Prodigy": "prodigyopt"}.get(optimizer, "torch"))
    if optimizer == "AdamWScheduleFree":
        pytest.importorskip("schedulefree")
    options = {"optimizer_type": optimizer, "save_state": True, "save_every_n_steps": 3}
    assert run(tmp_path, output_name="whole", max_train_steps=6, **options) == 0
    state = tmp_path / "whole-step00000003-state"
    assert run(tmp_path, output_name="rest", max_train_steps=6, resume=state, **options) == 0
    assert same_weights(tmp_path / "whole.safetensors", tmp_path / "rest.safetensors")


def test_sdxl_trains_and_draws(tmp_path: Path, tiny_sdxl: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat --w 64 --h 64 --s 2\n")
    options = {"pretrained_model_name_or_path": tiny_sdxl, "mixed_precision": "bf16"}
    options |= {"sample_prompts": prompts, "sample_every_n_steps": 4}
    dataset = write_dataset(tmp_path / "data")
    command = words(dataset_config=dataset, output_dir=tmp_path, **options)
    assert sdxl_train_network.main(command) == 0
    trained = load_file(tmp_path / "short.safetensors")
    for part in ("lora_unet_", "lora_te1_", "lora_te2_"):
        ups = [w for name, w in trained.items() if part in name and "lora_up" in name]
        assert any(up.any() for up in ups)
    assert len(list((tmp_path / "sample").glob("short_000004_*.png"))) == 1


def test_report_and_curves_are_left_beside_the_adapter(tmp_path: Path) -> None:
    assert run(tmp_path, logging_dir=tmp_path / "logs") == 0
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "short_curves.svg").exists()
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
