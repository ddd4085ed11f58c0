"""Training runs as a user starts them: real processes, on a tiny SD 1.x model."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from tiny_models import save_tiny_model
from torch import Tensor

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "configs" / "quickstart" / "images"

# A short run; tests add to it or override it.
SHORT: dict[str, object] = {
    "network_module": "networks.lora",
    "network_dim": 4,
    "network_alpha": 4,
    "optimizer_type": "HinaAdamW",
    "learning_rate": 1e-3,
    "cache_latents": True,
    "seed": 1,
    "output_name": "short",
    "max_train_steps": 4,
}


@cache
def model() -> Path:
    """The tiny model as a diffusers folder, the same for all tests of a session."""
    folder = Path(tempfile.mkdtemp(prefix="hina-tiny-"))
    atexit.register(shutil.rmtree, folder)
    return save_tiny_model("sd1", folder / "sd1")


def write_dataset(folder: Path, batch_size: int = 2, pictures: int = 7, extra: str = "") -> Path:
    """A dataset TOML over `pictures` of the quickstart's pictures, copied to `folder`.

    An odd number by default: then the last batch of an epoch is smaller than the others.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    for picture in sorted(IMAGES.glob("*.png"))[:pictures]:
        (images / picture.name).write_bytes(picture.read_bytes())
        (images / picture.with_suffix(".txt").name).write_text(
            picture.with_suffix(".txt").read_text()
        )
    path = folder / "dataset.toml"
    path.write_text(
        f"""
[general]
caption_extension = ".txt"
{extra}
[[datasets]]
resolution = 64
batch_size = {batch_size}
[[datasets.subsets]]
image_dir = '{images}'
num_repeats = 1
"""
    )
    return path


def arguments(**options: object) -> list[str]:
    """Options as words of a command line; True is a bare flag, None leaves one out."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, (list, tuple)):
            words.extend(str(part) for part in value)
        elif value is not True:
            words.append(str(value))
    return words


def command(**options: object) -> list[str]:
    """The command line of a short run with `options`."""
    return [sys.executable, "train_network.py", *words(**options)]


def words(**options: object) -> list[str]:
    """The options of a short run, changed by `options`, as words of a command line."""
    return arguments(**({"pretrained_model_name_or_path": model()} | SHORT | options))


def environment() -> dict[str, str]:
    return dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def train(**options: object) -> subprocess.CompletedProcess[str]:
    """Run it to its end and return what it said; the run must succeed."""
    finished = subprocess.run(
        command(**options), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished


def run_twice(script: Path, **variables: str) -> None:
    """Run a script in two processes that torchrun starts; both must succeed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = subprocess.run(
        [*launch, str(script)],
        env=environment()
        | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
        | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def same_weights(left: Path, right: Path) -> bool:
    """Whether two adapter files hold the same tensors, bit for bit."""
    a: dict[str, Tensor] = load_file(left)
    b: dict[str, Tensor] = load_file(right)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
