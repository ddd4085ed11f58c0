"""What AdaptiveHinaAdamW finds is kept in a run's file, also over a resume, and can be drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from factored_models import Adapter, train
from PIL import Image
from runs import ROOT, environment, words, write_dataset
from torch import nn

import train_network
from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.telemetry import optimizer_snapshot, optimizer_summary
from library.training.errors import UserError
from library.training.snapshots import SNAPSHOTS, Snapshots, read_snapshots

LR, INTERVAL, WARMUP = 1e-3, 4, 6
SETTINGS: dict[str, Any] = {
    "relationship_discovery_interval": INTERVAL,
    "warmup_steps": WARMUP,
    "lr_bump": 5e-5,
    "max_lr": 2e-3,
    "backend": "eager",
}


def adaptive(model: nn.Module, named: bool = True, **options: Any) -> AdaptiveHinaAdamW:
    items = model.named_parameters() if named else model.parameters()
    return AdaptiveHinaAdamW(items, lr=LR, **{**SETTINGS, **options})


def run(model: nn.Module, optimizer: AdaptiveHinaAdamW, steps: int, first: int = 0) -> None:
    for _ in train(model, optimizer, steps, first):
        pass


# What a snapshot tells


@pytest.mark.parametrize("steps", [0, 1, WARMUP - 1, INTERVAL + WARMUP])
@pytest.mark.parametrize("named", [True, False])
def test_a_snapshot_tells_what_the_reports_tell(steps: int, named: bool) -> None:
    model = Adapter(repeats=2)
    optimizer = adaptive(model, named)
    run(model, optimizer, steps)
    found = optimizer.snapshot()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    names = [name for name, _ in model.named_parameters()]
    assert found["step"] == steps
    assert found["names"] == (names if named else [""] * len(names))
    assert found["shapes"] == [list(p.shape) for p in model.parameters()]
    statistics = optimizer.get_importance_analysis()["importance_statistics"]
    assert len(found["importances"]) == len(names)
    assert np.mean(found["importances"]) == pytest.approx(1.0, rel=1e-5)
    if steps:
        assert max(found["importances"]) == pytest.approx(statistics["max"], rel=1e-5)
    relations_told(optimizer, found)
    masks_told(optimizer, list(model.parameters()), found)
    assert found["lr_mask"]["moves"] == (0 < steps < WARMUP)


def relations_told(optimizer: AdaptiveHinaAdamW, found: dict[str, Any]) -> None:
    """Each pair once, with the figures that the report has for its first parameter."""
    reported = {
        (one["param_index"], one["partner_index"]): one
        for one in optimizer.get_relationship_summary()["relationships"]
    }
    assert bool(reported) == (found["step"] >= INTERVAL)
    assert {frozenset(one["pair"]) for one in found["relations"]} == set(map(frozenset, reported))
    assert 2 * len(found["relations"]) == len(reported)
    for one in found["relations"]:
        report = reported[tuple(one["pair"])]
        assert one["product"] == report["interaction_type"]
        for name in ("compatibility", "product_norm"):
            assert one[name] == pytest.approx(report[name], rel=1e-5)


def masks_told(
    optimizer: AdaptiveHinaAdamW, params: list[nn.Parameter], found: dict[str, Any]
) -> None:
    """Hold the counts against the factors of all elements."""
    edges, counts = found["lr_mask_edges"], found["lr_mask"]["counts"]
    assert (edges[0], edges[-1], len(edges)) == (pytest.approx(0.001), 10.0, len(counts) + 1)
    assert np.diff(np.log10(edges)) == pytest.approx(1 / 40)
    masks = [optimizer.masks(p) for p in params]
    factors = [mask.flatten() / LR for mask in masks if mask is not None]
    wanted, _ = np.histogram(torch.cat(factors) if factors else [], edges)
    assert counts == wanted.tolist()
    assert sum(counts) == (sum(p.numel() for p in params) if factors else 0)


def test_packed_masks_are_counted_with_their_higher_bits() -> None:
    """Some elements rise and the others fall, until they are more than 256 bumps apart."""
    params = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = AdaptiveHinaAdamW(
        params, lr=LR, lr_bump=3e-6, max_lr=2e-3, warmup_steps=200, backend="eager"
    )
    for step in range(202):
        for p in params:
            p.grad = torch.ones_like(p)
            p.grad[:, 0] = (-1.0) ** step
        optimizer.step()
    assert "lr_mask_high" in optimizer.state[params[0]]
    found = optimizer.snapshot()
    masks_told(optimizer, params, found)
    moved = 198 * 3e-6 / LR  # the first step moves none, and the last that does is the 199th
    bins = np.searchsorted(found["lr_mask_edges"], [1 - moved, 1 + moved]) - 1
    assert [found["lr_mask"]["counts"][k] for k in bins] == [6, 18]
    assert not found["lr_mask"]["moves"]


def test_what_is_off_is_empty() -> None:
    model = Adapter(repeats=1)
    optimizer = adaptive(model, use_dynamic_adaptation=False, use_lr_mask=False)
    run(model, optimizer, INTERVAL)
    found = optimizer.snapshot()
    assert (found["importances"], found["relations"]) == ([], [])
    assert found["lr_mask"] == {"counts": [0] * 160, "moves": False}


# What a run may ask


def test_only_optimizers_that_look_for_something_have_snapshots() -> None:
    model = Adapter(repeats=1)
    optimizer = adaptive(model)
    assert optimizer_snapshot(optimizer) == optimizer.snapshot()
    assert optimizer_snapshot(Accelerator(cpu=True).prepare(optimizer)) == optimizer.snapshot()
    assert optimizer_snapshot(HinaAdamWOptimizer(model.parameters())) is None
    assert optimizer_snapshot(torch.optim.AdamW(model.parameters())) is None


def test_the_log_says_what_will_be_looked_for() -> None:
    model = Adapter(repeats=1)
    lines = optimizer_summary(adaptive(model, use_agr=False))
    assert "use_lr_mask" in lines[0]
    assert "use_agr" not in lines[0]
    assert lines[0].endswith("8-bit state")
    assert lines[1:] == [
        "relations are looked for every 4 steps, first at step 4; importance is measured at every "
        "step",
        "lr_mask moves until step 6, by 5e-05 a step between 1e-07 and 0.002",
    ]
    silent = adaptive(model, use_dynamic_adaptation=False, use_lr_mask=False, optim_bits=32)
    assert len(optimizer_summary(silent)) == 1
    assert optimizer_summary(silent)[0].endswith("32-bit state")
    assert optimizer_summary(torch.optim.AdamW(model.parameters())) == []


# The file


@pytest.mark.parametrize("total", [1, 7, 40, 41, 1000, 999_983])
def test_snapshots_are_spread_over_the_run_and_the_last_step_has_one(total: int) -> None:
    snapshots = Snapshots(Path("none"), total)
    due = [step for step in range(1, total + 1) if snapshots.due(step)]
    assert len(due) == min(total, SNAPSHOTS)
    assert due[-1] == total
    gaps = np.diff([0, *due])
    assert gaps.max() - gaps.min() <= 1


def take_all(
    snapshots: Snapshots, optimizer: AdaptiveHinaAdamW, model: Adapter, steps: range
) -> None:
    for step in steps:
        run(model, optimizer, 1, first=step)
        if snapshots.due(step):
            snapshots.take(optimizer, step)


def test_a_run_writes_one_line_a_snapshot_and_names_only_once(tmp_path: Path) -> None:
    model, path = Adapter(repeats=1), tmp_path / "new folder" / "x-optimizer.jsonl"
    optimizer = adaptive(model)
    snapshots = Snapshots(path, 8)
    assert snapshots.written() == []
    take_all(snapshots, optimizer, model, range(1, 9))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert ["names" in line for line in lines] == [True] + [False] * 7
    last = optimizer.snapshot()
    assert lines[-1] == {key: last[key] for key in ("step", "importances", "relations", "lr_mask")}
    assert lines[0]["shapes"] == last["shapes"]
    assert snapshots.written() == read_snapshots(path) == lines
    Snapshots(path, 8).take(optimizer, 3)  # another run in that folder, under the same name
    assert [line["step"] for line in read_snapshots(path)] == [3]


def test_optimizers_without_snapshots_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "x-optimizer.jsonl"
    snapshots = Snapshots(path, 1)
    snapshots.take(torch.optim.AdamW(Adapter(repeats=1).parameters()), 1)
    assert not path.exists()
    assert snapshots.written() == []


@pytest.mark.parametrize("cut", [0, 1, 200])
def test_a_resumed_run_goes_on_behind_its_step(tmp_path: Path, cut: int) -> None:
    """The first part went on to step 6, where it was killed while it wrote."""
    model, path = Adapter(repeats=1), tmp_path / "x-optimizer.jsonl"
    optimizer = adaptive(model)
    take_all(Snapshots(path, 8), optimizer, model, range(1, 7))
    written = path.read_text()
    path.write_text(written[: len(written) - cut])
    take_all(Snapshots(path, 8, resumed_at=4), optimizer, model, range(5, 9))
    lines = path.read_text().splitlines()
    assert lines[:4] == written.splitlines()[:4]
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
    assert sum("names" in json.loads(line) for line in lines) == 1


def test_a_file_of_other_parameters_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "x-optimizer.jsonl"
    Snapshots(path, 8).take(adaptive(Adapter(repeats=2)), 1)
    optimizer = adaptive(Adapter(repeats=1))
    Snapshots(path, 8, resumed_at=3).take(optimizer, 4)
    (only,) = read_snapshots(path)
    assert only["step"] == 4
    assert only["shapes"] == optimizer.snapshot()["shapes"]


def test_readers_skip_a_last_line_that_was_cut_off_and_refuse_other_damage(tmp_path: Path) -> None:
    path = tmp_path / "x-optimizer.jsonl"
    snapshots = Snapshots(path, 8)
    optimizer = adaptive(Adapter(repeats=1))
    for step in (1, 2, 3):
        snapshots.take(optimizer, step)
    text = path.read_text()
    for end in (len(text) - 1, len(text) - 30, text.rindex('{"step"') + 1):
        path.write_text(text[:end])
        assert [line["step"] for line in read_snapshots(path)] == [1, 2]
    path.write_text(text[:100])
    assert read_snapshots(path) == []
    for damaged in ("\0\0\n", "[]\n", "{}\n", text.splitlines()[1] + "\n"):
        path.write_text(damaged + text)
        with pytest.raises(UserError, match=r"x-optimizer\.jsonl, line 1: this is no snapshot"):
            Snapshots(path, 8, resumed_at=3)


# Whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, its state after five, and a run from there."""
    folder = tmp_path_factory.mktemp("runs")
    options: dict[str, object] = {
        "dataset_config": write_dataset(folder / "data"),
        "optimizer_type": "AdaptiveHinaAdamW",
        "optimizer_args": [f"{key}={value}" for key, value in SETTINGS.items()],
        "max_train_steps": 8,
        "save_every_n_steps": 5,
        "save_state": True,
    }
    train_once(output_dir=folder / "whole", **options)
    state = folder / "whole" / "short-step00000005-state"
    parts = folder / "parts"
    parts.mkdir()
    (parts / "short-optimizer.jsonl").write_bytes(
        (folder / "whole" / "short-optimizer.jsonl").read_bytes()[:-50]
    )
    train_once(output_dir=parts, resume=state, **options)
    return folder


def train_once(**options: object) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps it for a process
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert train_network.main(words(**options)) == 0


@pytest.mark.slow
def test_a_run_tells_what_its_optimizer_found(folder: Path) -> None:
    path = folder / "whole" / "short-optimizer.jsonl"
    snapshots = read_snapshots(path)
    assert [snapshot["step"] for snapshot in snapshots] == list(range(1, 9))
    assert any("lora_down" in name for name in snapshots[0]["names"])
    assert [bool(snapshot["relations"]) for snapshot in snapshots] == [False] * 3 + [True] * 5
    assert [snapshot["lr_mask"]["moves"] for snapshot in snapshots] == [True] * 5 + [False] * 3
    page = (folder / "whole" / "report.html").read_text(encoding="utf-8")
    assert "<td>short-optimizer.jsonl</td>" in page
    assert "What the optimizer found" in page


@pytest.mark.slow
def test_a_resumed_run_has_the_same_file_as_one_that_was_not_interrupted(folder: Path) -> None:
    whole, parts = (folder / name / "short-optimizer.jsonl" for name in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_other_optimizers_write_no_such_file(tmp_path: Path) -> None:
    train_once(
        dataset_config=write_dataset(tmp_path / "data", pictures=2),
        output_dir=tmp_path,
        optimizer_type="AdamW",
        max_train_steps=1,
    )
    assert not list(tmp_path.glob("*.jsonl"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What the optimizer found" not in page


# The pictures


def draw(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plot_optimizer.py", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_the_tool_draws_a_run(folder: Path, tmp_path: Path) -> None:
    drawn = draw(folder / "whole" / "short-optimizer.jsonl", "--out", tmp_path / "pictures")
    assert drawn.returncode == 0, drawn.stderr
    for name in ("importance", "relations", "lr_mask"):
        path = tmp_path / "pictures" / f"{name}.png"
        assert str(path) in drawn.stdout.split()
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100  # not an empty sheet


def test_the_tool_says_what_it_lacks(tmp_path: Path) -> None:
    without = "import sys, runpy; sys.modules['matplotlib'] = None; "
    script = without + "runpy.run_path('tools/plot_optimizer.py', run_name='__main__')"
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 1
    assert finished.stderr.strip() == "This tool draws with matplotlib: pip install matplotlib"


def test_hundreds_of_halves_without_a_partner_are_counted_not_listed() -> None:
    """As in LoRA-FA, where the other halves are frozen."""
    halves = [torch.nn.Parameter(torch.ones(4, 2)) for _ in range(11)]
    named = [(f"block{k:02}.lora_up.weight", half) for k, half in enumerate(halves)]
    alone = [line for line in optimizer_summary(HinaAdamWOptimizer(named)) if "partner" in line]
    assert alone[:8] == [
        f"without a partner: block{k:02}.lora_up.weight [4, 2]: no lora_a of the same base name"
        for k in range(8)
    ]
    assert alone[8:] == ["without a partner: 3 more"]
