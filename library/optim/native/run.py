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
from .functions import CPU, addresses
from .program import Program, translate


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
        self.program, self._advance = _load(tuple(chain), batch.variant)
        self._batch = batch
        count = len(batch.params)
        self._held = torch.zeros(len(self.program.pointers), count, dtype=torch.int64)
        self._keys = torch.zeros(count, dtype=torch.int32)
        self._unknown = set(range(count))
        self._noise = noise.table(CPU)

    def run(self, turn: Turn) -> dict[str, Tensor]:
        """One step of the turn's parameters; returns the report, `[active]` by name."""
        self._note_new_ones()
        count, params = len(turn.params), turn.params
        # A view with gaps is worked on as a copy: the program knows addresses, not strides.
        gaps = not all(map(Tensor.is_contiguous, params))
        packed = [param.contiguous() for param in params] if gaps else params
        held = self._held[:, turn.index].clone()
        held[0], held[1] = addresses(packed), addresses(turn.grads)
        factors = [turn.factors[technique] for technique in self.program.factors]
        given = torch.cat([turn.numbers, torch.stack(factors)]) if factors else turn.numbers
        report = torch.empty(len(self.program.reports), count, dtype=torch.float64)
        numel = self._batch.numel[turn.index]
        seeds = noise.seeds(self._keys[turn.index], turn.numbers[1])
        arrays = (numel, given, report, held, seeds, self._noise)
        call = _Call(count, torch.get_num_threads(), *(array.data_ptr() for array in arrays))
        self._advance(ctypes.byref(call))
        for param, copy in zip(params, packed, strict=True) if gaps else ():
            if copy is not param:
                param.copy_(copy)
        # What autograd saved of the parameters is out of date: as after any change in place.
        torch.autograd.graph.increment_version(params)
        return dict(zip(self.program.reports, report.unbind(), strict=True))

    def _note_new_ones(self) -> None:
        """Where the state of parameters lies that had none before."""
        for k in [k for k in self._unknown if self._batch.entries[k]]:
            entry = self._batch.entries[k]
            for row, name in enumerate(self.program.pointers[2:], 2):
                self._held[row, k] = entry[name].data_ptr()
            self._keys[k] = entry["noise_key"]
            self._unknown.remove(k)


@lru_cache(maxsize=64)
def _load(chain: tuple[Technique, ...], variant: Variant) -> tuple[Program, ctypes._FuncPointer]:
    program = translate(chain, variant)
    function = build.load(program.source).advance
    function.argtypes, function.restype = [ctypes.POINTER(_Call)], None
    return program, function
