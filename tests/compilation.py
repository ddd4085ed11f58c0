"""How the tests compile optimizers: some three hundred programs, most of them for tiny tensors."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from library.optim.native.build import _FLAGS, compiler

# What the headers of library/optim/native include: half of the time of a compilation goes there.
PRELUDE = """
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
"""
LITTLE = "-O1"  # half the time of -O3


def quick_compilation(folder: Path) -> str:
    """The compiler's flags for `$HINA_CXXFLAGS`; with g++, system headers precompiled in `folder`.

    Nobody waits for these: until they are there, the compiler reads the headers themselves.
    """
    program = compiler()
    if program is None or not Path(program).name.startswith("g++"):
        return LITTLE
    header = folder / "prelude.h"
    header.write_text(PRELUDE)
    made = f"{header}.gch"
    command = [program, *_FLAGS, LITTLE, "-x", "c++-header", str(header), "-o", f"{made}.part"]
    subprocess.Popen(["sh", "-c", f"{shlex.join(command)} && mv {made}.part {made}"])
    return f"{LITTLE} -include {header}"
