"""What a newcomer gets: the quickstart, run as `python launch.py train` runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, environment

CONFIG = ROOT / "configs" / "quickstart.toml"

pytestmark = pytest.mark.slow


def saturation(pictures: list[Path]) -> float:
    """Mean of max - min over the channels: 0 for greys, 1 for pure colours."""
    pixels = np.stack([np.asarray(Image.open(picture).convert("RGB")) for picture in pictures])
    return float((pixels.max(-1) - pixels.min(-1)).mean() / 255)


def cpu_seconds() -> float:
    """Of the processes that ended so far: other programs do not stretch it as they do the clock."""
    times = os.times()  # Windows does not count children
    return times.children_user + times.children_system


def test_colours_give_way_to_ink(tmp_path: Path) -> None:
    before = cpu_seconds()
    finished = subprocess.run(
        [
            *(sys.executable, "train_network.py", "--config_file", CONFIG),
            *("--output_dir", tmp_path, "--logging_dir", tmp_path / "logs"),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = finished.stderr
    assert finished.returncode == 0, said[-4000:]
    assert cpu_seconds() - before < 240  # two minutes of two cores

    found, of_all = re.search(r"LoKr pairs found: (\d+) of (\d+) modules", said).groups()
    assert int(found) == int(of_all) > 50

    _, named = said.split("What this run wrote:")
    files = [Path(name) for name in re.findall(rf"({re.escape(str(tmp_path))}\S+)", named)]
    assert all(file.is_file() for file in files)
    assert {"ink-style.safetensors", "report.html"} <= {file.name for file in files}
    pictures = [file for file in files if file.parent.name == "sample"]
    first = [picture for picture in pictures if "_000000_" in picture.name]
    last = [picture for picture in pictures if "_000080_" in picture.name]
    assert len(first) == len(last) == 6
    assert saturation(last) < 0.5 * saturation(first)
