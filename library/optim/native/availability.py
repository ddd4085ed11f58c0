"""Whether machine code can be had here, and for which tensors."""

from __future__ import annotations

from functools import lru_cache

import torch

from . import build

CPU = torch.device("cpu")
TYPES = (torch.float32, torch.bfloat16)

_TRIAL = '#include "lanes.h"\nextern "C" float trial(float x) { return largest(splat(x)); }\n'


@lru_cache(maxsize=1)
def problem() -> str | None:
    """Why machine code cannot be had here, as a sentence; None if it can. Tried, not guessed."""
    if build.compiler() is None:
        return "No C++ compiler (g++ or clang++) was found."
    try:
        build.load(_TRIAL)
    except (build.CompilerError, OSError) as error:
        return f"The C++ compiler does not make code that runs here: {error}."
    return None


def fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is machine code for such tensors: float32 and bfloat16 on the processor."""
    return device == CPU and dtype in TYPES
