"""Parameters that run through the chain together, and what the chain is told of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .chain import Variant
from .techniques.base import Technique

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay")


class Batch:
    """All parameters of one variant, in the optimizer's order.

    Attributes:
        params, families, groups, positions: of each parameter, the tensor, the family of its role,
            the index of its group and its place among all of the optimizer's.
        entries: the optimizer's state of each, empty before its first gradient.
    """

    def __init__(
        self,
        variant: Variant,
        params: Sequence[Tensor],
        families: Sequence[str],
        groups: Sequence[int],
        positions: Sequence[int],
        entries: Sequence[dict[str, Any]],
    ) -> None:
        self.variant = variant
        self.params = list(params)
        self.families = list(families)
        self.groups = torch.tensor(groups)
        self.positions = list(positions)
        self.entries = list(entries)
        self.numel = torch.tensor([param.numel() for param in params], dtype=torch.float64)
        self._addresses = [param.data_ptr() for param in params]
        self.names = [n for slot in variant.slots for n in slot.names]
        self._held: list[list[Tensor | None]] = [[None] * len(params) for _ in self.names]

    def adopt(self, index: int) -> None:
        """Note the tensors that are now held of a parameter."""
        for column, name in zip(self._held, self.names, strict=True):
            column[index] = self.entries[index][name]

    def is_as_before(self) -> bool:
        """Whether parameters and their state still lie where they did.

        A parameter moves with `.to()`, its state where a program takes it to another device or
        replaces it.
        """
        dtype, device = self.variant.dtype, self.variant.device
        if [param.data_ptr() for param in self.params] != self._addresses:
            return False
        if not all(p.dtype is dtype and p.device == device for p in self.params):
            return False
        begun = [k for k, entry in enumerate(self.entries) if entry]
        entries = [self.entries[k] for k in begun]
        if any(name not in entry for entry in entries for name in self.names):
            return False
        for name, column in zip(self.names, self._held, strict=True):
            noted = column if len(begun) == len(column) else [column[k] for k in begun]
            if not all(map(is_, map(itemgetter(name), entries), noted)):
                return False
        return True


@dataclass(frozen=True)
class Turn:
    """What of a batch takes part in one step.

    Attributes:
        active: indices of the parameters that have a gradient.
        grads: their gradients.
        numbers: float64 `[7, active]`: `numel`, `step` and the group's hyper-parameters.
        factors: of each technique that has one, float64 `[active]`.
    """

    batch: Batch
    active: list[int]
    grads: list[Tensor]
    numbers: Tensor
    factors: Mapping[Technique, Tensor]

    @property
    def params(self) -> list[Tensor]:
        return [self.batch.params[k] for k in self.active]

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [self.batch.entries[k] for k in self.active]


def make_turn(
    batch: Batch,
    active: list[int],
    grads: list[Tensor],
    groups: Sequence[dict[str, Any]],
    chain: Sequence[Technique],
    prepared: Mapping[Technique, Tensor],
) -> Turn:
    """What the chain is told of the parameters that have a gradient, their steps counted on."""
    entries = [batch.entries[k] for k in active]
    index = torch.tensor(active)
    steps = [entry["step"] + 1 for entry in entries]
    hyper = torch.tensor([_hyper(group) for group in groups], dtype=torch.float64)
    numbers = torch.cat(
        [
            batch.numel[index][None],
            torch.tensor(steps, dtype=torch.float64)[None],
            hyper[batch.groups[index]].T,
        ]
    )
    factors = {}
    for technique in chain:
        if not technique.has_factor:
            continue
        factor = prepared.get(technique)
        if factor is not None:
            positions = torch.tensor([batch.positions[k] for k in active])
            factors[technique] = factor.to("cpu")[positions]
        else:
            factors[technique] = _schedule(technique, batch, active, steps)
    return Turn(batch, active, grads, numbers, factors)


def _hyper(group: dict[str, Any]) -> list[float]:
    return [group["lr"], *group["betas"], group["eps"], group["weight_decay"]]


def _schedule(technique: Technique, batch: Batch, active: list[int], steps: list[int]) -> Tensor:
    """The technique's factors; asked once for each family and step that occur."""
    places = [(batch.families[k], step) for k, step in zip(active, steps, strict=True)]
    values = {place: technique.schedule(*place) for place in set(places)}
    return torch.tensor([values[place] for place in places], dtype=torch.float64)
