"""The compiled chain on a batch of parameters, where they lie."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .. import noise
from ..batch import Batch, Turn
from ..chain import Variant
from ..roles import LoRAPair
from . import build
from .availability import CPU
from .pairs import Order, order_of
from .program import Program, translate


class _Call(ctypes.Structure):
    """`Call` of call.h."""

    _fields_ = (
        ("tensors", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("numel", ctypes.c_void_p),
        ("lines", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("looked", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("report", ctypes.c_void_p),
        ("held", ctypes.c_void_p),
        ("seeds", ctypes.c_void_p),
        ("noise", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Look:
    """What a look at gradients found.

    Attributes:
        grads: int64 `[active]`, where they lie.
        sums: float64 `[looks, active]`.
        finite: whether all are.
        order: in which the tensors come next, with the pairs whose norms need not be given.
    """

    grads: Tensor
    sums: Tensor
    finite: bool
    order: Order


class NativeChain:
    """A chain's machine code for one batch, with the addresses of what is held."""

    def __init__(self, batch: Batch, pairs: Sequence[LoRAPair]) -> None:
        self.program, self._code = _load(batch.variant)
        self._batch = batch
        uses_pairs = any(technique.uses_pair_norm for technique in batch.variant.chain)
        self._pairs = pairs if uses_pairs else ()
        count = len(batch.params)
        self._held = torch.zeros(len(self.program.pointers), count, dtype=torch.int64)
        self._held[0] = _addresses(batch.params)
        self._keys = torch.zeros(count, dtype=torch.int32)
        self._unknown = set(range(count))
        self._noise = noise.table(CPU)

    def look(self, turn: Turn) -> Look:
        """Look at the turn's gradients; nothing is changed."""
        count = len(turn.params)
        grads = _addresses(turn.grads)
        sums = torch.empty(self.program.looks, count, dtype=torch.float64)
        numel = self._batch.numel[turn.index]
        call = _call(count, numel=numel, grads=grads, looked=sums)
        finite = bool(self._code.look_at_all(ctypes.byref(call)))
        whole = isinstance(turn.index, slice)
        order = self._whole_order if whole else order_of(turn.params, self._pairs)
        return Look(grads, sums, finite, order)

    def run(self, turn: Turn, look: Look) -> dict[str, Tensor]:
        """One step of the turn's parameters; returns the report, `[active]` by name."""
        self._note_new_ones()
        count, params = len(turn.params), turn.params
        # A view with gaps is worked on as a copy: the program knows addresses, not strides.
        gaps = not all(map(Tensor.is_contiguous, params))
        packed = [param.contiguous() for param in params] if gaps else params
        held = self._held[:, turn.index].clone()
        if gaps:
            held[0] = _addresses(packed)
        factors = [turn.factors[technique] for technique in self.program.factors]
        report = torch.empty(len(self.program.reports), count, dtype=torch.float64)
        arrays = {
            "order": look.order.tensors,
            "ranks": look.order.ranks,
            "numel": self._batch.numel[turn.index],
            "lines": self._batch.lines[:, turn.index].contiguous(),
            "grads": look.grads,
            "looked": look.sums,
            "given": torch.cat([turn.numbers, torch.stack(factors)]) if factors else turn.numbers,
            "report": report,
            "held": held,
            "seeds": noise.seeds(self._keys[turn.index], turn.numbers[1]),
            "noise": self._noise,
        }
        self._code.advance_all(ctypes.byref(_call(count, **arrays)))
        for param, copy in zip(params, packed, strict=True) if gaps else ():
            if copy is not param:
                param.copy_(copy)
        # What autograd saved of the parameters is out of date: as after any change in place.
        for param in params:  # PyTorch before 2.6 takes no list
            torch.autograd.graph.increment_version(param)
        return dict(zip(self.program.reports, report.unbind(), strict=True))

    @cached_property
    def _whole_order(self) -> Order:
        return order_of(self._batch.params, self._pairs)

    def _note_new_ones(self) -> None:
        """Where the state of parameters lies that had none before."""
        for k in [k for k in self._unknown if self._batch.entries[k]]:
            entry = self._batch.entries[k]
            for row, name in enumerate(self.program.pointers[1:], 1):
                self._held[row, k : k + 1] = _addresses([entry[name]])
            self._keys[k] = entry["noise_key"]
            self._unknown.remove(k)


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where each tensor's numbers begin, int64 `[tensors]`.

    Raises:
        RuntimeError: one has no memory.
    """
    where = array("q", map(Tensor.data_ptr, tensors))
    if 0 in where:
        shape = tuple(tensors[where.index(0)].shape)
        raise RuntimeError(
            f"A parameter, its gradient or its state (of shape {shape}) has no memory: the storage "
            "was emptied."
        )
    return torch.frombuffer(where, dtype=torch.int64)


def _call(count: int, **arrays: Tensor) -> _Call:
    where = {name: array.data_ptr() for name, array in arrays.items()}
    return _Call(tensors=count, threads=torch.get_num_threads(), **where)


def compile_all(variants: Sequence[Variant]) -> None:
    """Make the machine code of several programs at the same time.

    Raises:
        CompilerError: the compiler refused one.
        UntranslatableError: a technique has a line without translation.
    """
    sources = {_program(variant).source for variant in variants}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(build.load, sources))


@lru_cache(maxsize=64)
def _program(variant: Variant) -> Program:
    return translate(variant)


@lru_cache(maxsize=64)
def _load(variant: Variant) -> tuple[Program, ctypes.CDLL]:
    program = _program(variant)
    code = build.load(program.source)
    for function in (code.look_at_all, code.advance_all):
        function.argtypes = [ctypes.POINTER(_Call)]
    code.look_at_all.restype, code.advance_all.restype = ctypes.c_int, None
    return program, code
