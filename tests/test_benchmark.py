"""`benchmarks/optimizer_step.py` as a process on a few modules, and the parts that make figures."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))

import optimizer_step
import stopwatch
from contenders import BY_KEY, CONTENDERS, REFERENCE, Contender
from stopwatch import Plan, Runner, Spread, compare
from workload import Workload, lora_in_tensors, sdxl_lora, sdxl_lora_of_size, size_of

SMALL = ["--modules", "12", "--rounds", "2", "--warmup", "1", "--threads", "1"]


def run(*words: str) -> str:
    finished = subprocess.run(
        [sys.executable, "benchmarks/optimizer_step.py", *SMALL, *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def columns(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_a_run_gives_table_json_and_chart(tmp_path: Path) -> None:
    keys = ["adamw-fused", "adamw-loop", "hina"]
    file, chart = tmp_path / "speed.json", tmp_path / "speed.svg"
    said = run("--only", *keys, "--json", str(file), "--chart", str(chart))
    told = json.loads(file.read_text("utf-8"))
    assert set(told) == {"machine", "workload", "optimizers"}
    assert {"cpu", "cores", "threads", "torch", "date"} <= set(told["machine"])
    assert told["workload"]["tensors"] == 24
    assert [result["key"] for result in told["optimizers"]] == keys
    table = [columns(line) for line in said.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(keys)
    assert len({len(row) for row in table}) == 1
    for result, row in zip(told["optimizers"], table[2:], strict=True):
        assert result["obstacle"] is None
        assert result["rounds"] == 2
        assert 0 < result["ratio"]["low"] <= result["ratio"]["median"] <= result["ratio"]["high"]
        assert row[0].startswith(result["label"])
        assert row[2] == f"{result['ratio']['median']:.2f}"
        assert row[4] == f"{result['state_bytes']:.2f}"
    fused, _, hina = told["optimizers"]
    assert fused["state_bytes"] == pytest.approx(8, rel=1e-3)
    assert 2 < hina["state_bytes"] < 2.2
    texts = [
        text.text for text in ElementTree.parse(chart).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {result["label"] for result in told["optimizers"]} <= set(texts)


@pytest.mark.slow
def test_sizes_counts_of_tensors_and_memory_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "more.json"
    more = ("--scaling", "0.1", "0.4", "--tensors", "4", "40", "--memory")
    said = run(*more, "--modules", "100", "--only", "adamw-fused", "--json", str(file))
    told = json.loads(file.read_text("utf-8"))
    assert "largest relative residual" in said
    (scaling,), (tensors,), (memory,) = told["scaling"], told["tensors"], told["memory"]
    assert scaling["largest_residual"] == pytest.approx(0, abs=1e-6)  # two points are on a line
    assert len(scaling["sizes"]) == 2
    few, many = (result["ms"]["median"] for result in tensors["counts"])
    assert tensors["slowdown"] == pytest.approx(many / few)
    assert memory["held_of_gradients"] == pytest.approx(2, abs=0.5)  # AdamW's two moments


@pytest.mark.slow
def test_compilations_are_counted_from_an_empty_cache(tmp_path: Path) -> None:
    file = tmp_path / "compile.json"
    run("--compile", "30", "--json", str(file))
    (cost,) = json.loads(file.read_text("utf-8"))["compile"]
    assert 1 <= cost["compilations_first_step"] == cost["compilations"]
    assert cost["first_step_s_cached"] < cost["first_step_s"]


def test_every_optimizer_that_is_not_installed_is_listed_as_such() -> None:
    missing = Contender("x", "X", "no_such_package.optim", "X", "no-such-package")
    assert missing.obstacle() == "not installed"
    newer = Contender("x", "X", "torch.optim", "AdamW", "torch", {"fused": True, "wings": 2})
    assert newer.obstacle() == "this version has no argument wings"
    gone = Contender("x", "X", "torch.optim", "AdamX", "torch")
    assert "cannot be imported" in str(gone.obstacle())
    assert REFERENCE.obstacle() is None
    assert len(BY_KEY) == len(CONTENDERS)


def test_the_tensors_are_those_of_sdxl() -> None:
    whole = sdxl_lora()
    assert (len(whole), size_of(whole)) == (1972, 57_008_128)
    half = sdxl_lora_of_size(28e6)
    assert size_of(half) == pytest.approx(28e6, rel=0.01)
    assert len(half) == pytest.approx(986, rel=0.1)  # the mix of sizes is that of the whole
    twice = sdxl_lora_of_size(2 * size_of(whole))
    assert (len(twice), size_of(twice)) == (2 * 1972, 2 * 57_008_128)
    for count in (200, 20_000):
        shapes = lora_in_tensors(count, 57_008_128)
        assert len(shapes) == count
        assert size_of(shapes) == pytest.approx(57_008_128, rel=0.01)


def test_gradients_change_and_are_put_right() -> None:
    workload = Workload(lora_in_tensors(4, 4096))
    parameters = workload.new_parameters()
    before = [gradient.clone() for gradient in workload.gradients.values()]
    for gradient in workload.gradients.values():
        gradient.zero_()
    workload.new_gradients()
    for parameter, old in zip(parameters.values(), before, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.all()
        assert not parameter.grad.equal(old)
        assert parameter.all()


def test_ratios_are_of_one_round_and_the_two_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Scripted(Runner):
        def __init__(self, *arguments: Any, name: str = "tested") -> None:
            super().__init__(*arguments)
            self.name, self.steps = name, 0

        def step(self) -> float:
            order.append(self.name)
            self.steps += 1
            return self.steps * (3.0 if self.name == "tested" else 1.0)

    workload = Workload(lora_in_tensors(2, 512))
    reference = Scripted(REFERENCE, workload, name="reference")
    monkeypatch.setattr(stopwatch, "Runner", Scripted)
    plan = Plan(warmup=0, rounds=4, least=4)
    found = compare(REFERENCE, reference, workload, plan)
    assert found.ratio == Spread(3.0, 3.0, 3.0)
    assert found.ms.median == 7.5
    assert order == ["reference", "tested", "tested", "reference"] * 2


def test_state_is_counted_once_and_without_the_parameters() -> None:
    workload = Workload(lora_in_tensors(2, 4096))
    runner = Runner(Contender("x", "X", "torch.optim", "SGD", "torch", {"momentum": 0.9}), workload)
    runner.step()
    assert runner.state_bytes() == 4
    scratch = torch.zeros(2 * workload.parameters, dtype=torch.float16)
    for parameter, state in runner.optimizer.state.items():
        state["same again"] = [state["momentum_buffer"].view(-1), parameter, parameter.grad]
    vars(runner.optimizer)["scratch"] = {"a": scratch[:7], "b": scratch}
    assert runner.state_bytes() == 4
    assert runner.held_bytes() == 4 + 4


def test_a_line_is_fitted_to_relative_residuals() -> None:
    a, b, residuals = optimizer_step.fit_line([1, 10, 100], [5.0, 23.0, 203.0])
    assert (a, b) == pytest.approx((3.0, 2.0))
    assert residuals == pytest.approx([0, 0, 0])
    counts, times = [1, 10, 100], [5.0, 26.0, 203.0]
    a, b, residuals = optimizer_step.fit_line(counts, times)

    def squares(a: float, b: float) -> float:
        return sum(((a + b * n) / t - 1) ** 2 for n, t in zip(counts, times, strict=True))

    best = sum(residual**2 for residual in residuals)
    assert best == pytest.approx(squares(a, b))
    for near in ((1.01 * a, b), (0.99 * a, b), (a, 1.01 * b), (a, 0.99 * b)):
        assert squares(*near) > best


def test_the_benchmark_of_relations_finds_every_pair() -> None:
    finished = subprocess.run(
        [sys.executable, "benchmarks/relations.py", "--modules", "10", "--steps", "12"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    found = {row[0]: row[1:] for row in map(columns, finished.stdout.splitlines()) if row[1:]}
    assert found["at the end, without names"] == ["10 of 10 (100.0 %)", "0"]
    assert found["with names"] == ["10 of 10 (100.0 %)", "0"]
    assert found["shapes and entries alone"] != found["with names"]
