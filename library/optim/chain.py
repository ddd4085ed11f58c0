"""One step of a chain of techniques, from what is held to what is held afterwards.

The same lines run on tensors (`eager`) and are translated to C++ (`native`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import noise
from .lines import Axis
from .state import CODES, FIXED, NEAREST, Kind, axis_of, decode, encode
from .techniques.base import Technique, Work

HYPER = ("lr", "beta1", "beta2", "beta3", "eps", "eps_square", "eps_residual", "weight_decay")
"""What a group sets, in numbers."""

PER_TENSOR = ("numel", "step", *HYPER, "pair_norm")
"""What the chain is told of each tensor, beside factors."""


class Blocks(Protocol):
    """The layout as a chain needs it: sums, per-block maxima and noise."""

    def sum(self, matrix: Tensor) -> Tensor: ...

    def spread(self, per_tensor: Tensor) -> Tensor: ...

    def line_sum(self, matrix: Tensor, axis: Axis) -> Tensor: ...

    def line_mean(self, matrix: Tensor, axis: Axis) -> Tensor: ...

    def spread_lines(self, lines: Tensor, axis: Axis) -> Tensor: ...

    def to_lines(self, per_tensor: Tensor, axis: Axis) -> Tensor: ...

    def mean_of_rows(self, rows: Tensor) -> Tensor: ...

    def largest(self, matrix: Tensor) -> Tensor:
        """`[blocks, 1]`: the largest number of each block."""
        ...

    def noise(self, number: int, axis: Axis | None = None) -> Tensor:
        """int32 of 20 bits for each element or line, the `number`-th draw of this step."""
        ...


@dataclass(frozen=True)
class Variant:
    """What tensors must have in common to run through a chain together.

    Attributes:
        chain: the techniques that take part in the step.
        device, dtype: the parameters'.
        kept: what is kept of them, by name.
        coded: the names of what is held in 8 bits.
        stochastic: whether bfloat16 and float16 parameters are rounded stochastically.
        stochastic_codes: whether codes of 8 bits are; else to the nearest.
    """

    chain: tuple[Technique, ...]
    device: torch.device
    dtype: torch.dtype
    kept: tuple[tuple[str, Kind], ...]
    coded: frozenset[str]
    stochastic: bool
    stochastic_codes: bool = True

    @property
    def maths(self) -> torch.dtype:
        """The precision of the maths, and of moments that are not in 8 bits."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def slots(self) -> list[Slot]:
        """The tensors that are held of each parameter."""
        return [Slot(name, kind, name in self.coded) for name, kind in self.kept]


@dataclass(frozen=True)
class Slot:
    """One thing kept of each parameter, and whether it is held as codes and scales."""

    name: str
    kind: Kind
    coded: bool

    @property
    def axis(self) -> Axis | None:
        """What it has a number of: each row or column, or each element (or the tensor)."""
        return axis_of(self.kind)

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
        return _STORED.get(self.kind, variant.maths)


_STORED: dict[Kind, torch.dtype] = {
    "whole": torch.int16,
    "byte": torch.uint8,
    "packed": torch.uint8,
    "scalar": torch.float64,
}


def advance(
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
    before = dict(state)
    for technique in variant.chain:
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
        if value is before[slot.name]:
            continue  # kept for another phase
        if slot.kind in FIXED:
            raise ValueError(f"A technique changes '{slot.name}', which is of kind {slot.kind}.")
        if slot.coded:
            noise_here = blocks.noise(draws, slot.axis) if variant.stochastic_codes else NEAREST
            codes, scale = encode(value, slot.kind, noise_here, blocks.largest)
            after |= {slot.name: codes, slot.scale: scale}
            draws += 1
        else:
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
