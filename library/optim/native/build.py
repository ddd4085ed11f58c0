"""From C++ to a loaded library, once for each program and machine."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
_HEADERS = ("lanes.h", "call.h", "lines.h", "products.h", "driver.h")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


def _flags() -> tuple[str, ...]:
    """Those of every program, and behind them what `$HINA_CXXFLAGS` adds."""
    return (*_FLAGS, *shlex.split(os.environ.get("HINA_CXXFLAGS", "")))


_compilations = 0
_counting = threading.Lock()


class CompilerError(RuntimeError):
    """The C++ compiler refused a program; the message holds what it said."""


def compilations() -> int:
    """How many programs this process has compiled (not those it found compiled)."""
    return _compilations


@lru_cache(maxsize=1)
def compiler() -> str | None:
    """The C++ compiler: `$CXX`, or the first of `g++`, `clang++` and `c++` on the path.

    None on Windows: Microsoft's has no vector extensions, and others' runtimes are not found.
    """
    if sys.platform == "win32":
        return None
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled programs lie: `$HINA_CACHE`, or the user's cache folder."""
    if folder := os.environ.get("HINA_CACHE"):
        return Path(folder)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "hina-optim"


def load(source: str) -> ctypes.CDLL:
    """The library made from a C++ program; compiled if the cache does not have it.

    Raises:
        CompilerError: there is no compiler, or it refused the program.
    """
    name = f"{_fingerprint(source)}.so"
    path = cache_folder() / name
    if not path.exists():
        path = _writable_folder(cache_folder()) / name
    if not path.exists():
        _compile(source, path)
    return ctypes.CDLL(str(path))


@lru_cache(maxsize=4)
def _writable_folder(folder: Path) -> Path:
    """The cache, or where it cannot be written a folder of this process's own."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and os.access(folder, os.W_OK):
        return folder
    logger.warning("%s cannot be written: the optimizer compiles anew in each run.", folder)
    own = Path(tempfile.mkdtemp(prefix="hina-optim-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def _compile(source: str, path: Path) -> None:
    global _compilations
    program = compiler()
    if program is None:
        raise CompilerError("No C++ compiler was found (g++ or clang++).")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hina-optim-") as scratch:
        text, made = Path(scratch, "program.cpp"), Path(scratch, "program.so")
        text.write_text(source)
        command = [program, *_flags(), f"-I{_SOURCES}", str(text), "-o", str(made)]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise CompilerError(f"{' '.join(command)} failed:\n{finished.stderr[-4000:]}")
        # Several processes may compile the same: each moves a whole file into place.
        handle, aside = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(made.read_bytes())
        os.chmod(aside, 0o755)
        os.replace(aside, path)
    with _counting:
        _compilations += 1
    logger.info("Compiled the optimizer's step in %.1f s.", time.perf_counter() - start)


def _fingerprint(source: str) -> str:
    """Of all that the machine code depends on: the program, the compiler and the processor."""
    parts = [source, *_flags(), *((_SOURCES / name).read_text() for name in _HEADERS)]
    return hashlib.sha256("\0".join([*parts, _machine()]).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _machine() -> str:
    program = compiler() or ""
    version = ""
    if program:
        version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    flags = ""
    if (info := Path("/proc/cpuinfo")).exists():
        # "flags" on x86, "Features" on ARM.
        lines = info.read_text().splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return "\0".join([program, version, platform.machine(), platform.processor(), flags])
