"""All parameters of an optimizer at once, for techniques that compare them with one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .roles import Roles
from .scratch import ScratchPool


@dataclass(frozen=True)
class Overview:
    """Every parameter's tensor, state and figures in one step. Vectors are float64 `[parameters]`
    on the processor, in the optimizer's order.

    Attributes:
        params, names: of each parameter, "" where it has no name.
        entries: their state; empty before their first step, and not to be written into then.
        scratch: memory for what is computed from whole matrices.
        reported: figures that techniques reported in this step, NaN for parameters without a
            gradient; before the step empty.
    """

    roles: Roles
    entries: Sequence[dict[str, Any]]
    scratch: ScratchPool
    reported: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def params(self) -> list[Tensor]:
        return list(self.roles.names)

    @cached_property
    def names(self) -> list[str]:
        return list(self.roles.names.values())

    @cached_property
    def begun(self) -> Tensor:
        """Which parameters have taken a step, truth values."""
        return torch.tensor([bool(entry) for entry in self.entries])

    def numbers(self, name: str, default: float) -> Tensor:
        """A number that was noted of each parameter, `default` where none was."""
        values = [entry.get(name, default) for entry in self.entries]
        return torch.tensor(values, dtype=torch.float64)

    def note(self, name: str, values: Tensor) -> None:
        """Keep a number of each parameter that has taken a step, in its state."""
        for entry, value in zip(self.entries, values.tolist(), strict=True):
            if entry:
                entry[name] = value
