"""The compiled chain on a batch of parameters, where they lie."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import noise
from ..batch import Batch, Turn
from ..chain import Variant
from ..techniques.base import Technique
from . import build
from .functions import CPU, TYPES, addresses
from .program import Program, translate


def can_run(variant: Variant) -> bool:
    """Whether there is machine code for such tensors: float32 and bfloat16 on the processor."""
    return variant.device == CPU and variant.dtype in TYPES


class _Call(ctypes.Structure):
    """`Call` of the program (see program.py)."""

    _fields_ = (
        ("tensors", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("numel", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("report", ctypes.c_void_p),
        ("held", ctypes.c_void_p),
        ("seeds", ctypes.c_void_p),
        ("noise", ctypes.c_void_p),
    )


class NativeChain:
    """A chain's machine code for one batch, with the addresses of what is held."""

    def __init__(self, chain: Sequence[Technique], batch: Batch) -> None:
        self.batch = batch
        self.program, self._advance = _load(tuple(chain), batch.variant)
        count = len(batch.params)
        self._held = torch.zeros(len(self.program.pointers), count, dtype=torch.int64)
        self._known = [False] * count
        self._keys = torch.zeros(count, dtype=torch.int32)
        self._numel = torch.tensor([param.numel() for param in batch.params])
        self._noise = noise.table(CPU).to(torch.uint16)

    def run(self, turn: Turn) -> dict[str, Tensor]:
        """One step of the turn's parameters; returns the report, `[active]` by name."""
        for k in turn.active:
            if not self._known[k]:
                self._note(k)
        dtype, params = self.batch.variant.dtype, turn.params
        # A view with gaps is worked on as a copy: the program knows addresses, not strides.
        packed = [param if param.is_contiguous() else param.contiguous() for param in params]
        grads = [
            g if g.is_contiguous() and g.dtype is dtype else _packed(g, dtype) for g in turn.grads
        ]
        index = torch.tensor(turn.active)
        held = self._held[:, index]
        held[0], held[1] = addresses(packed), addresses(grads)
        factors = [turn.factors[technique] for technique in self.program.factors]
        given = torch.cat([turn.numbers, torch.stack(factors)]) if factors else turn.numbers
        report = torch.empty(len(self.program.reports), len(params), dtype=torch.float64)
        numel = self._numel[index]
        seeds = noise.seeds(self._keys[index], turn.numbers[1])
        call = _Call(
            len(params),
            torch.get_num_threads(),
            *(
                tensor.data_ptr()
                for tensor in (numel, given.contiguous(), report, held, seeds, self._noise)
            ),
        )
        self._advance(ctypes.byref(call))
        for param, copy in zip(params, packed, strict=True):
            if copy is not param:
                param.copy_(copy)
        return dict(zip(self.program.reports, report.unbind(), strict=True))

    def _note(self, k: int) -> None:
        entry = self.batch.entries[k]
        for row, name in enumerate(self.program.pointers[2:], 2):
            self._held[row, k] = entry[name].data_ptr()
        self._keys[k] = entry["noise_key"]
        self._known[k] = True


def _packed(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.to(dtype).contiguous()


@lru_cache(maxsize=64)
def _load(chain: tuple[Technique, ...], variant: Variant) -> tuple[Program, ctypes._FuncPointer]:
    program = translate(chain, variant)
    function = build.load(program.source).advance
    function.argtypes, function.restype = [ctypes.POINTER(_Call)], None
    return program, function
