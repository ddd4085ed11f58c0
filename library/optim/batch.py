"""Parameters that run through the chain together, and what takes part in one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .chain import Variant
from .lines import AXES, lines_of
from .roles import family_of
from .techniques.base import Technique


class Batch:
    """All parameters of one variant, in the optimizer's order.

    Attributes:
        params, roles, groups, positions: of each parameter, the tensor, its role, the index of its
            group and its place among all of the optimizer's.
        entries: the optimizer's state of each, empty before its first gradient.
        addresses, sizes: where each parameter lies, and of how many elements it is.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.params: list[Tensor] = []
        self.roles: list[str] = []
        self.groups: list[int] = []
        self.positions: list[int] = []
        self.entries: list[dict[str, Any]] = []
        self.addresses: list[int] = []
        self.sizes: list[int] = []
        names = [name for slot in variant.slots for name in slot.names]
        self._held: dict[str, list[Tensor | None]] = {name: [] for name in names}
        # What state lies in stays alive while its address is known.
        self._lies: list[dict[str, tuple[int, torch.UntypedStorage]]] = []
        self._steps = 0

    def add(
        self, param: Tensor, role: str, group: int, position: int, entry: dict[str, Any]
    ) -> None:
        """Take a parameter in; `entry` is its state, or empty."""
        self.params.append(param)
        self.roles.append(role)
        self.groups.append(group)
        self.positions.append(position)
        self.entries.append({})
        self.addresses.append(param.data_ptr())
        self.sizes.append(param.numel())
        self._lies.append({})
        for held in self._held.values():
            held.append(None)
        if entry:
            self.begin(len(self.params) - 1, entry)

    def begin(self, index: int, entry: dict[str, Any]) -> None:
        """Note the state of a parameter, and where it lies."""
        self.entries[index] = entry
        for name, held in self._held.items():
            held[index] = entry[name]
        self._lies[index] = {
            name: (entry[name].data_ptr(), entry[name].untyped_storage()) for name in self._held
        }

    def is_as_before(self) -> bool:
        """Whether parameters and their state still lie where they did.

        A parameter moves with `.to()`, its state where a program puts another tensor in its place
        or gives one other `data`. The latter would be slow to look for everywhere (two thousand
        adapters have ten thousand tensors): each step asks some dozens, spread over all, so that
        moving the state of all is noticed at once, and that of a single tensor after some steps.
        """
        self._steps += 1
        return (
            # An address on another device is another address.
            list(map(Tensor.data_ptr, self.params)) == self.addresses
            and list(map(Tensor.numel, self.params)) == self.sizes
            and set(map(attrgetter("dtype"), self.params)) == {self.variant.dtype}
            and all(
                all(map(is_, [entry.get(name) for entry in self.entries], held))
                for name, held in self._held.items()
            )
            and self._some_data_is_as_before()
        )

    def _some_data_is_as_before(self) -> bool:
        begun = [k for k, lies in enumerate(self._lies) if lies]
        stride = 1 + len(begun) // 64
        return all(
            self.entries[k][name].data_ptr() == address
            for k in begun[self._steps % stride :: stride]
            for name, (address, _) in self._lies[k].items()
        )

    @cached_property
    def numel(self) -> Tensor:
        """`[parameters]` int64."""
        return torch.tensor(self.sizes)

    @cached_property
    def lines(self) -> Tensor:
        """`[4, parameters]` int64: the width and height of each one's matrices, the size of its
        filters, and how many lines it has of the axis of which it has most."""
        shapes = [param.shape for param in self.params]
        sizes = [[lines_of(shape, axis).size for axis in AXES] for shape in shapes]
        most = [max(lines_of(shape, axis).number for axis in AXES) for shape in shapes]
        return torch.cat([torch.tensor(sizes).T, torch.tensor([most])])

    @cached_property
    def group_index(self) -> Tensor:
        """`[parameters]`: the index of each one's group."""
        return torch.tensor(self.groups)

    @cached_property
    def position_index(self) -> Tensor:
        """`[parameters]`: each one's place among all of the optimizer's."""
        return torch.tensor(self.positions)

    @cached_property
    def families(self) -> list[str]:
        """The family of each one's role."""
        return [family_of(role) for role in self.roles]


@dataclass
class Turn:
    """What of a batch takes part in one step.

    Attributes:
        index: `[active]`, which parameters have a gradient; a slice where all have.
        params, entries, roles: those parameters, and what the batch knows of them.
        grads: their gradients, contiguous and of the parameters' type.
        numbers: float64 `[numbers, active]`, what `PER_TENSOR` names, on the parameters' device.
        factors: of each technique that has one, float64 `[active]`, there too.
    """

    batch: Batch
    index: Tensor | slice
    params: list[Tensor]
    entries: list[dict[str, Any]]
    roles: list[str]
    grads: list[Tensor]
    numbers: Tensor = field(init=False)
    factors: dict[Technique, Tensor] = field(default_factory=dict)

    def tell(
        self,
        groups: Sequence[dict[str, Any]],
        prepared: Mapping[Technique, Tensor],
        pair_norms: Tensor,
    ) -> None:
        """Fill in what the chain is told per tensor, for the step that comes.

        Args:
            prepared, pair_norms: float64 `[parameters]`, of all parameters of the optimizer.
        """
        steps = [step + 1 for step in map(itemgetter("step"), self.entries)]
        hyper = torch.tensor([_hyper(group) for group in groups], dtype=torch.float64)
        rows = [self.batch.numel[self.index].double(), torch.tensor(steps, dtype=torch.float64)]
        rows += hyper[self.batch.group_index[self.index]].T
        device, positions = self.batch.variant.device, self.batch.position_index[self.index]
        norms = pair_norms.to(device)[positions]
        self.numbers = torch.cat([torch.stack(rows).to(device), norms.unsqueeze(0)])
        for technique in self.batch.variant.chain:
            if not technique.has_factor:
                continue
            factor = prepared.get(technique)
            if factor is None:
                self.factors[technique] = self._schedule(technique, steps).to(device)
            else:
                self.factors[technique] = factor.to(device)[positions]

    def _schedule(self, technique: Technique, steps: list[int]) -> Tensor:
        """A technique's factors; it is asked once for each family and step that occur."""
        families = self.batch.families
        if not isinstance(self.index, slice):
            families = [families[k] for k in self.index.tolist()]
        if len(set(steps)) == 1:
            values = {family: _asked(technique, family, steps[0]) for family in set(families)}
            return torch.tensor([values[family] for family in families], dtype=torch.float64)
        places = list(zip(families, steps, strict=True))
        known = {place: _asked(technique, *place) for place in set(places)}
        return torch.tensor([known[place] for place in places], dtype=torch.float64)


def make_turn(batch: Batch) -> Turn | None:
    """The parameters of a batch that have a gradient; None if none has.

    Raises:
        RuntimeError: a gradient of another size or on another device than its parameter.
    """
    grads = [param.grad for param in batch.params]
    if all(grad is not None for grad in grads):
        lists = (batch.params, batch.entries, batch.roles)
        packed = _pack(batch.params, batch.sizes, grads, batch.variant)
        return Turn(batch, slice(None), *lists, packed)
    active = [k for k, grad in enumerate(grads) if grad is not None]
    if not active:
        return None
    params = [batch.params[k] for k in active]
    entries = [batch.entries[k] for k in active]
    roles = [batch.roles[k] for k in active]
    sizes = [batch.sizes[k] for k in active]
    packed = _pack(params, sizes, [grads[k] for k in active], batch.variant)
    return Turn(batch, torch.tensor(active), params, entries, roles, packed)


def _pack(
    params: Sequence[Tensor],
    sizes: Sequence[int],
    grads: Sequence[Tensor | None],
    variant: Variant,
) -> list[Tensor]:
    """Contiguous gradients of the parameters' type; most are already."""
    given = [grad for grad in grads if grad is not None]
    same_sizes = list(map(Tensor.numel, given)) == sizes
    if not same_sizes or set(map(Tensor.get_device, given)) != {params[0].get_device()}:
        param, grad = next(
            (p, g)
            for p, g in zip(params, given, strict=True)
            if p.numel() != g.numel() or p.device != g.device
        )
        raise RuntimeError(
            f"A parameter of shape {tuple(param.shape)} on {param.device} has a gradient of shape "
            f"{tuple(grad.shape)} on {grad.device}: the parameter was changed after its backward "
            "pass. Nothing was updated."
        )
    dtypes = set(map(attrgetter("dtype"), given))
    if dtypes == {variant.dtype} and all(map(Tensor.is_contiguous, given)):
        return given
    return [grad.to(variant.dtype).contiguous() for grad in given]


def _asked(technique: Technique, family: str, step: int) -> float:
    factor = technique.schedule(family, step)
    if not math.isfinite(factor):
        raise ValueError(
            f"{type(technique).__name__}.schedule gives {factor} for {family} in step {step}."
        )
    return factor


def _hyper(group: dict[str, Any]) -> list[float]:
    """A group's numbers in the order of `HYPER`."""
    betas, eps = group["betas"], group["eps"]
    three = [*betas, *[0.0] * (3 - len(betas))]
    square, residual, plain = eps if isinstance(eps, tuple) else (0.0, 0.0, eps)
    return [group["lr"], *three, plain, square, residual, group["weight_decay"]]
