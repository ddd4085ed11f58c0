"""Machine code that is no part of a chain: for many tensors at once, where they lie."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build

CPU = torch.device("cpu")
TYPES = (torch.float32, torch.bfloat16)


def can_check(tensor: Tensor) -> bool:
    """Whether there is machine code to check such a tensor."""
    return tensor.dtype in TYPES and tensor.device == CPU and tensor.is_contiguous()


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers of tensors that `can_check` accepts are finite."""
    for dtype in TYPES:
        some = [tensor for tensor in tensors if tensor.dtype is dtype]
        numel = torch.tensor([tensor.numel() for tensor in some])
        half, threads = dtype is torch.bfloat16, torch.get_num_threads()
        arguments = (addresses(some).data_ptr(), numel.data_ptr(), len(some), half, threads)
        if some and not _function("check.cpp", "all_finite")(*arguments):
            return False
    return True


def lora_row_norms(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean row norm of B·A of each pair (A, B), float64 `[pairs]`.

    All must be contiguous, of one type and on the processor; A is `[rank, …]`, B `[…, rank]`.
    """
    half = pairs[0][0].dtype is torch.bfloat16
    a, b = addresses([a for a, _ in pairs]), addresses([b for _, b in pairs])
    shapes = torch.tensor(
        [(a.shape[0], a.numel() // a.shape[0], b.numel() // a.shape[0]) for a, b in pairs]
    )
    norms = torch.empty(len(pairs), dtype=torch.float64)
    _function("products.cpp", "row_norms")(
        a.data_ptr(),
        b.data_ptr(),
        shapes.data_ptr(),
        len(pairs),
        half,
        torch.get_num_threads(),
        norms.data_ptr(),
    )
    return norms


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where each tensor's numbers begin, int64 `[tensors]`."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


_ADDRESS, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS: dict[str, list[Any]] = {
    "all_finite": [_ADDRESS, _ADDRESS, _COUNT, _INT, _INT],
    "row_norms": [_ADDRESS, _ADDRESS, _ADDRESS, _COUNT, _INT, _INT, _ADDRESS],
}


@lru_cache(maxsize=4)
def _function(file: str, name: str) -> ctypes._FuncPointer:
    """A function of a C++ file in this folder."""
    source = (Path(__file__).parent / file).read_text()
    function: ctypes._FuncPointer = getattr(build.load(source), name)
    function.argtypes = _ARGUMENTS[name]
    return function
