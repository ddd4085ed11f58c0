"""One step of a chain of techniques, from what is held to what is held afterwards.

The same lines run on tensors (`eager`) and are translated to C++ (`native`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import noise
from .state import CODES, FIXED, QUANTIZABLE, Kind, decode, encode
from .techniques.base import Technique, Work

PER_TENSOR = ("numel", "step", "lr", "beta1", "beta2", "eps", "weight_decay", "pair_norm")
"""What the chain is told of each tensor, beside factors."""


class Blocks(Protocol):
    """The layout as a chain needs it: sums, per-block maxima and noise."""

    def sum(self, matrix: Tensor) -> Tensor: ...

    def spread(self, per_tensor: Tensor) -> Tensor: ...

    def largest(self, matrix: Tensor) -> Tensor:
        """`[blocks, 1]`: the largest number of each block."""
        ...

    def noise(self, number: int) -> Tensor:
        """int32 of 20 bits, the `number`-th draw of this step."""
        ...


@dataclass(frozen=True)
class Variant:
    """What tensors must have in common to run through a chain together.

    Attributes:
        device, dtype: the parameters'.
        kept: what the chain keeps of them, by name.
        quantized: whether moments are held in 8 bits.
        stochastic: whether bfloat16 and float16 parameters are rounded stochastically.
    """

    device: torch.device
    dtype: torch.dtype
    kept: tuple[tuple[str, Kind], ...]
    quantized: bool
    stochastic: bool

    @property
    def maths(self) -> torch.dtype:
        """The precision of the maths, and of moments that are not in 8 bits."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def slots(self) -> list[Slot]:
        """The tensors that are held of each parameter."""
        slots = []
        for name, kind in self.kept:
            coded = self.quantized and kind in QUANTIZABLE
            slots.append(Slot(name, kind, coded))
        return slots


@dataclass(frozen=True)
class Slot:
    """One thing kept of each parameter, and whether it is held as codes and scales."""

    name: str
    kind: Kind
    coded: bool

    @property
    def scale(self) -> str:
        """Under which name the scales of codes are held."""
        return f"{self.name}_scale"

    @property
    def high(self) -> str:
        """Under which name the upper two bits of packed numbers are held."""
        return f"{self.name}_high"

    @property
    def names(self) -> list[str]:
        """The tensors of a parameter's state that hold it."""
        if self.coded:
            return [self.name, self.scale]
        return [self.name, self.high] if self.kind == "packed" else [self.name]

    def stored(self, variant: Variant) -> torch.dtype:
        """The precision in which it is held."""
        if self.coded:
            return CODES[self.kind]
        if self.kind == "initial":
            return variant.dtype
        own = {"whole": torch.int16, "packed": torch.uint8, "scalar": torch.float64}
        return own.get(self.kind, variant.maths)


def advance(
    chain: Sequence[Technique],
    variant: Variant,
    held: Mapping[str, Tensor],
    p: Tensor,
    grad: Tensor,
    per_tensor: Mapping[str, Tensor],
    factors: Mapping[Technique, Tensor],
    blocks: Blocks,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The parameters after the step, what is held of them, and the report.

    Args:
        held: by name; codes with their scales, packed numbers in two parts, all else as values.
        per_tensor: by the names of `PER_TENSOR`.
    """
    state = {slot.name: _read(slot, held) for slot in variant.slots}
    arguments: dict[str, Any] = dict(per_tensor)
    work = Work(layout=blocks, **arguments, factors=factors, grad=grad, p=p, state=state)
    for technique in chain:
        technique.apply(work)
    if undeclared := work.state.keys() - {slot.name for slot in variant.slots}:
        raise ValueError(
            f"A technique keeps {', '.join(map(repr, sorted(undeclared)))} without declaring it in "
            "`state`."
        )
    after: dict[str, Tensor] = {}
    draws = 0
    for slot in variant.slots:
        value = work.state[slot.name]
        if slot.coded:
            codes, scale = encode(value, slot.kind, blocks.noise(draws), blocks.largest)
            after |= {slot.name: codes, slot.scale: scale}
            draws += 1
        elif slot.kind not in FIXED:
            after[slot.name] = value
    new_p = work.new_p
    if variant.stochastic:
        new_p = noise.round_to(new_p, variant.dtype, blocks.noise(draws))
    elif variant.dtype == torch.bfloat16:
        new_p = noise.round_to_nearest(new_p)
    return new_p, after, work.report


def _read(slot: Slot, held: Mapping[str, Tensor]) -> Tensor:
    """What techniques see of a slot."""
    value = held[slot.name]
    if slot.coded:
        return decode(value, held[slot.scale], slot.kind)
    return value + (held[slot.high] << 8) if slot.kind == "packed" else value
