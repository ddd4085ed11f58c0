"""The scripts of docs/hina/examples as a user runs them: each tells whether it has learned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, environment

pytestmark = pytest.mark.slow

EXAMPLES = sorted((ROOT / "docs" / "hina" / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    names = {script.stem for script in EXAMPLES}
    assert {"lora_finetune", "full_finetune", "image_model", "language_model"} <= names
    assert "custom_regularizer" in names


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs_and_learns(script: Path, tmp_path: Path) -> None:
    # One of them compiles its step, as on most machines; the others have no compiler on the path.
    compiles = script.stem == "lora_finetune"
    finished = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environment() | {"PATH": os.environ["PATH"] if compiles else str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout.count("\n") >= 1
    assert ("No C++ compiler" in finished.stderr) != compiles
