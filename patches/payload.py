"""What is copied into a folder of sd-scripts, and the version of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

HOOK = "library/hina_plugin.py"
_FILES = (
    HOOK,
    "library/custom_*_optimizer.py",
    "library/automagic_cameamp_refactored.py",
    "library/optim/**/*.py",
    "library/optim/native/*.h",
)


def read_payload() -> dict[str, bytes]:
    """The files by their path, the same here and there, with forward slashes."""
    files = sorted({file for pattern in _FILES for file in ROOT.glob(pattern)})
    return {file.relative_to(ROOT).as_posix(): file.read_bytes() for file in files}


def version_of(payload: Mapping[str, bytes]) -> str:
    """`0.1.0 (1f3c9a2b)`: the plugin's number, and a fingerprint of all files together, whatever
    line endings the system has given them."""
    number = re.search(rb'^VERSION = "(.+)"\r?$', payload[HOOK], re.MULTILINE)
    assert number is not None, f"{HOOK} has no VERSION"
    digest = hashlib.sha256()
    for path, content in sorted(payload.items()):
        lines = content.replace(b"\r\n", b"\n")
        digest.update(path.encode() + b"\0" + hashlib.sha256(lines).digest())
    return f"{number[1].decode()} ({digest.hexdigest()[:8]})"
