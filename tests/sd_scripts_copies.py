"""Copies of the miniature of sd-scripts, and the plugin's command as a user types it."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = Path(__file__).parent / "miniature_sd_scripts"


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
