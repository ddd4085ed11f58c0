"""Copies of the miniature of sd-scripts, and the plugin's commands as a user types them."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from patches.anchors import ANCHORS
from patches.payload import HOOK, read_payload

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = Path(__file__).parent / "miniature_sd_scripts"
TRAIN_UTIL, TRAIN_NETWORK = (anchor.file for anchor in ANCHORS)
ENGINE = "library/optim/engine.py"


def miniature(folder: Path) -> Path:
    """A fresh copy at `folder`."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(MINIATURE, folder, ignore=ignored))


def contents(tree: Path) -> dict[str, str]:
    """The SHA-256 sum of every file, by path."""
    files = (file for file in tree.rglob("*") if file.is_file() and ".git" not in file.parts)
    return {
        file.relative_to(tree).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def folders(tree: Path) -> set[str]:
    """Every folder, by path."""
    return {each.relative_to(tree).as_posix() for each in tree.rglob("*") if each.is_dir()}


def patches(*words: object, root: Path = ROOT, **options: object) -> subprocess.CompletedProcess:
    """`python -m patches …`, run in `root`, as a process."""
    return subprocess.run(
        [sys.executable, "-m", "patches", *map(str, words)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.fixture
def tree(tmp_path):
    """A copy for one test."""
    return miniature(tmp_path / "sd-scripts")


def apply(tree, **options):
    done = patches("apply", "--target", tree, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def revert(tree):
    done = patches("revert", "--target", tree)
    assert done.returncode == 0, done.stderr
    return done.stdout


def status(tree):
    done = patches("status", "--target", tree)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(command, tree, **options):
    """The message of a command that must change nothing."""
    before = contents(tree) if tree.is_dir() else None
    done = patches(command, "--target", tree, **options)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert before is None or contents(tree) == before
    return done.stderr


def edit(tree, path, old, new):
    file = tree / path
    text = file.read_bytes()
    assert old in text
    file.write_bytes(text.replace(old, new, 1))


def older_plugin(folder):
    """A copy of this project whose plugin is an older one: other texts, one file more, one less."""
    for path in [
        *read_payload(),
        *(f"patches/{file.name}" for file in (ROOT / "patches").glob("*.py")),
    ]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    edit(folder, HOOK, b'VERSION = "', b'VERSION = "0.0.')
    edit(folder, "patches/anchors.py", b"@hina_plugin.extend", b"@(hina_plugin.extend)")
    (folder / "library/optim/old_name.py").write_text("# gone since\n")
    (folder / "library/optim/telemetry.py").unlink()
    return folder
