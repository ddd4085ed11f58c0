"""The scripts of docs/hina/examples as a user runs them: each tells whether it has learned."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runs import ROOT, environment

pytestmark = pytest.mark.slow

EXAMPLES = sorted((ROOT / "docs" / "hina" / "examples").glob("*.py"))
COMPILES = "lora_finetune"  # as on most machines; the others have no compiler on the path


def finished(script: Path, without_compiler: Path) -> subprocess.CompletedProcess[str]:
    path = os.environ["PATH"] if script.stem == COMPILES else str(without_compiler)
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environment() | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Two at a time: each takes longest to import what it needs."""
    nothing = tmp_path_factory.mktemp("path")
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda script: finished(script, nothing), EXAMPLES)
        return {script.stem: one for script, one in zip(EXAMPLES, done, strict=True)}


def test_there_are_examples() -> None:
    names = {script.stem for script in EXAMPLES}
    assert {"lora_finetune", "full_finetune", "image_model", "language_model"} <= names
    assert "custom_regularizer" in names


@pytest.mark.parametrize("name", [script.stem for script in EXAMPLES])
def test_an_example_runs_and_learns(runs, name) -> None:
    run = runs[name]
    assert run.returncode == 0, run.stderr[-4000:]
    assert ("No C++ compiler" in run.stderr) != (name == COMPILES)
    losses = [
        float(x) for x in re.findall(r"^step +\d+ \(\w+\):[ a-z]* ([\d.]+)", run.stdout, re.M)
    ]
    if name == "custom_regularizer":
        without, with_own = map(float, re.findall(r"\d\.\d+", run.stdout))
        assert with_own < 0.5 * without
    else:
        assert len(losses) >= 5
        assert losses[-1] < 0.6 * losses[0]
