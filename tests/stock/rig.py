"""A real sd-scripts, trained with as a user would: its own train_network.py, as a process.

`SD_SCRIPTS_DIR` names the folder, which is only read: trained with and patched is a copy.
`SD_SCRIPTS_PYTHON` names the interpreter with its packages, by default the one that runs the tests.
`SD_SCRIPTS_MODEL` says where the model of 2 GB is kept, by default among temporary files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import materials
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

_SECONDS = 600  # for one run; they take less than one minute
_PACKAGES = (
    *("torch", "accelerate", "diffusers", "transformers", "safetensors", "bitsandbytes", "cv2"),
    *("PIL", "einops", "imagesize", "toml", "tqdm", "voluptuous"),
)
# Short, and small enough for two processor cores.
_OPTIONS = (
    *("--resolution", "64,64", "--caption_extension", ".txt", "--cache_latents"),
    *("--train_batch_size", "1", "--learning_rate", "1e-3", "--seed", "3"),
    *("--network_dim", "4", "--network_alpha", "1", "--mixed_precision", "no"),
    *("--save_model_as", "safetensors", "--output_name", "adapter"),
    *("--max_data_loader_n_workers", "0"),
)


@dataclass(frozen=True)
class Run:
    """What a run of `train_network.py` left.

    Attributes:
        returncode: what the process ended with.
        log: all it said, on both streams.
        adapter: the file it saved, if it came to that.
    """

    returncode: int
    log: str
    adapter: Path

    def line(self, text: str) -> str:
        """What follows `text` on the first line of the log that has it."""
        for line in self.log.splitlines():
            if text in line:
                return line.partition(text)[2]
        raise AssertionError(f"no {text!r} in:\n{self.log[-4000:]}")


def stock_python() -> str:
    """The interpreter that runs sd-scripts."""
    return os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)


def working_copy(folder: Path) -> Path:
    """A copy of the user's sd-scripts at `folder`, a git repository of one commit, whatever the
    original is. Skips where none is named, or its packages are not there."""
    if "SD_SCRIPTS_DIR" not in os.environ:
        pytest.skip("SD_SCRIPTS_DIR names no folder of sd-scripts")
    source = Path(os.environ["SD_SCRIPTS_DIR"])
    if not (source / "train_network.py").is_file():
        pytest.fail(f"SD_SCRIPTS_DIR={source} has no train_network.py")
    if missing := missing_packages():
        pytest.skip(f"{stock_python()} lacks {missing}: SD_SCRIPTS_PYTHON names the interpreter")
    ignored = shutil.ignore_patterns(".git", "__pycache__", "venv", ".venv")
    shutil.copytree(source, folder, ignore=ignored)
    commit = ("-c", "user.name=tests", "-c", "user.email=tests", "commit", "-q", "-m", "stock")
    for words in (("init", "-q"), ("add", "-A"), commit):
        subprocess.run(["git", *words], cwd=folder, check=True, timeout=60)
    return folder


@cache
def missing_packages(wanted: tuple[str, ...] = _PACKAGES) -> str:
    """Those of `wanted` that sd-scripts' interpreter does not have, in words; empty if none."""
    program = (
        "import importlib.util, sys\n"
        "print(', '.join(x for x in sys.argv[1:] if importlib.util.find_spec(x) is None))"
    )
    command = [stock_python(), "-c", program, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


@cache
def equipment() -> Path:
    """The folder with `model`, `tokenizers` and `pictures`; the model is made only once."""
    folder = Path(os.environ.get("SD_SCRIPTS_MODEL", Path(tempfile.gettempdir(), "hina-stock")))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
        materials.write_model(unfinished / "model")
        materials.write_tokenizer(unfinished / "tokenizers")
        materials.write_pictures(unfinished / "pictures")
        unfinished.rename(folder)
    return folder


def environment() -> dict[str, str]:
    """Of a process in the tree: no GPU, no network, a log whose lines are not broken, and one
    thread with fixed arithmetic, so that a run that is repeated is the same to the bit."""
    variables = dict(os.environ, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", COLUMNS="4000")
    variables |= {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
    stood_in = bool(missing_packages(("torchvision",)))
    variables["PYTHONPATH"] = str(materials.STAND_IN) if stood_in else ""
    return variables


def train(tree: Path, output: Path, *words: str, steps: int = 3) -> Run:
    """Train a few steps in `tree` with the options `words`, which go over those of a short run."""
    output.mkdir(parents=True, exist_ok=True)
    folder = equipment()
    paths = {
        "--pretrained_model_name_or_path": folder / "model",
        "--tokenizer_cache_dir": folder / "tokenizers",
        "--train_data_dir": folder / "pictures",
        "--output_dir": output,
    }
    options = [str(word) for pair in paths.items() for word in pair]
    length = ("--max_train_steps", str(steps))
    done = subprocess.run(
        [stock_python(), "train_network.py", *options, *_OPTIONS, *length, *words],
        cwd=tree,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_SECONDS,
    )
    return Run(done.returncode, done.stdout, output / "adapter.safetensors")
