"""The tests that sd-scripts has of `get_optimizer` and `setup_parser`, run on the ones here.

They are its own files and lie in its folder: `SD_SCRIPTS_DIR=… pytest -m stock`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.stock


def test_stocks_tests_of_optimizers_pass_here(tmp_path: Path) -> None:
    if "SD_SCRIPTS_DIR" not in os.environ:
        pytest.skip("SD_SCRIPTS_DIR names no folder of sd-scripts")
    tests = Path(os.environ["SD_SCRIPTS_DIR"], "tests", "test_optimizer.py")
    if not tests.exists():
        pytest.skip("this version of sd-scripts has no tests/test_optimizer.py")
    shutil.copy(tests, tmp_path)
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests.name],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
