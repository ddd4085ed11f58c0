"""Machine code that is no part of a chain: for many tensors at once, where they lie."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build

CPU = torch.device("cpu")
TYPES = (torch.float32, torch.bfloat16)


@lru_cache(maxsize=1)
def problem() -> str | None:
    """Why machine code cannot be had here, as a sentence; None if it can. Tried, not guessed."""
    if build.compiler() is None:
        return "No C++ compiler (g++ or clang++) was found."
    try:
        _function("check.cpp", "all_finite")
    except (build.CompilerError, OSError) as error:
        return f"The C++ compiler does not make code that runs here: {error}."
    return None


def fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is machine code for such tensors: float32 and bfloat16 on the processor."""
    return device == CPU and dtype in TYPES


def all_finite(tensors: Sequence[Tensor], numel: Tensor) -> bool:
    """Whether all numbers of contiguous tensors of one type that fits are finite.

    Args:
        numel: int64 `[tensors]`, their sizes.
    """
    function = _function("check.cpp", "all_finite")
    half, threads = tensors[0].dtype is torch.bfloat16, torch.get_num_threads()
    where = addresses(tensors)
    return bool(function(where.data_ptr(), numel.data_ptr(), len(tensors), half, threads))


def lora_row_norms(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean row norm of B·A of each pair (A, B), float64 `[pairs]`.

    All must be contiguous, of one type and on the processor; A is `[rank, …]`, B `[…, rank]`.
    """
    half, threads = pairs[0][0].dtype is torch.bfloat16, torch.get_num_threads()
    shapes = [(a.shape[0], a.numel() // a.shape[0], b.numel() // a.shape[0]) for a, b in pairs]
    table = torch.empty(len(pairs), 5, dtype=torch.int64)
    table[:, 0], table[:, 1] = addresses([a for a, _ in pairs]), addresses([b for _, b in pairs])
    table[:, 2:] = torch.tensor(shapes)
    norms = torch.empty(len(pairs), dtype=torch.float64)
    function = _function("products.cpp", "row_norms")
    function(table.data_ptr(), len(pairs), half, threads, norms.data_ptr())
    return norms


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where each tensor's numbers begin, int64 `[tensors]`."""
    return torch.frombuffer(array("q", map(Tensor.data_ptr, tensors)), dtype=torch.int64)


_ADDRESS, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS: dict[str, list[Any]] = {
    "all_finite": [_ADDRESS, _ADDRESS, _COUNT, _INT, _INT],
    "row_norms": [_ADDRESS, _COUNT, _INT, _INT, _ADDRESS],
}


@lru_cache(maxsize=4)
def _function(file: str, name: str) -> ctypes._FuncPointer:
    """A function of a C++ file in this folder."""
    source = (Path(__file__).parent / file).read_text()
    function: ctypes._FuncPointer = getattr(build.load(source), name)
    function.argtypes = _ARGUMENTS[name]
    return function
