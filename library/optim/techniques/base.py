"""What a technique is, and what it works on."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from ..lines import Axis
from ..overview import Overview
from ..state import Kind

TINY = torch.finfo(torch.float32).tiny
"""The smallest normal float32: keeps a division by a sum that may be zero defined."""

FOREVER = sys.maxsize
"""The end of steps that have none."""

INNER_PACE = "lr_mask/factor"
"""Where the mean of the factors on lr that differ by element is reported, other factors aside."""


class Layout(Protocol):
    """How matrices, per-tensor and per-line quantities meet."""

    def sum(self, matrix: Tensor) -> Tensor:
        """The sum over each tensor: a matrix becomes a per-tensor quantity."""
        ...

    def spread(self, per_tensor: Tensor) -> Tensor:
        """A per-tensor quantity, to meet matrices elementwise."""
        ...

    def line_sum(self, matrix: Tensor, axis: Axis) -> Tensor:
        """The sum over each line: a matrix becomes a per-line quantity."""
        ...

    def line_mean(self, matrix: Tensor, axis: Axis) -> Tensor:
        """The mean over each line."""
        ...

    def spread_lines(self, lines: Tensor, axis: Axis) -> Tensor:
        """A per-line quantity, to meet matrices elementwise."""
        ...

    def to_lines(self, per_tensor: Tensor, axis: Axis) -> Tensor:
        """A per-tensor quantity, to meet per-line ones."""
        ...

    def mean_of_rows(self, rows: Tensor) -> Tensor:
        """Per row, the mean over all rows of its matrix."""
        ...


@dataclass(slots=True)
class Work:
    """Tensors in the middle of one step.

    There are three kinds of quantities. Matrices hold a number for each element: `[blocks, 256]`,
    float32 (float64 for float64 parameters). Per-tensor quantities hold one for each tensor:
    `[tensors]`, float64. `sum` leads from the first to the second and `spread` back. Between them
    lie per-line quantities (see `lines.Axis`), as precise as matrices: `line_sum` and `line_mean`
    lead there, `spread_lines` back, `to_lines` from per-tensor quantities. Apart from these
    everything is elementwise. Nothing is changed in place, and no branch of Python depends
    on a number: the same lines run on tensors and are translated to C++ (see `native`).

    Attributes:
        numel, step, lr, beta1, beta2, beta3, eps, eps_square, eps_residual, weight_decay: per
            tensor; the step counts from 1, the others are the group's as the scheduler has set
            them, 0 where an optimizer has fewer. Of three eps the first belongs to squares of
            gradients, the second to squares of what departs from the momentum.
        pair_norm: per tensor, for the halves of a LoRA pair the mean row norm of B·A before the
            step, 0 for others; computed if a technique `uses_pair_norm`.
        factors: of each technique that has one, its factor per tensor (`Technique.prepare`,
            `Technique.schedule`).
        grad: the gradient before any technique; regularizers, where there are any, have acted.
        g: the gradient as the techniques before have made it.
        p: the parameters before the step.
        u: the update's direction.
        normalised: what entered the momentum, where it was made by CAME.
        pace: per tensor, the factor on lr.
        inner_pace: per tensor, the mean of the factors on lr that differ by element and are
            multiplied into u.
        length: per tensor, a factor on u that is not multiplied into it, because it needs a sum
            that u itself does not.
        decay, rate: per tensor, once `Descent` has run: the step is decay·p − rate·u.
        new_p: the parameters after the step.
        state: what the techniques keep from step to step, by name.
        report: per-tensor figures of this step for telemetry.
    """

    layout: Layout
    numel: Tensor
    step: Tensor
    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    beta3: Tensor
    eps: Tensor
    eps_square: Tensor
    eps_residual: Tensor
    weight_decay: Tensor
    pair_norm: Tensor
    factors: Mapping[Technique, Tensor]
    grad: Tensor
    p: Tensor
    state: dict[str, Tensor]
    g: Tensor = field(init=False)
    u: Tensor = field(init=False)
    normalised: Tensor = field(init=False)
    new_p: Tensor = field(init=False)
    pace: Tensor | float = 1.0
    inner_pace: Tensor | float = 1.0
    length: Tensor | float = 1.0
    decay: Tensor | float = 1.0
    rate: Tensor | float = 0.0
    report: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.g = self.u = self.normalised = self.grad
        self.new_p = self.p

    def sum(self, matrix: Tensor) -> Tensor:
        """The sum over each tensor, per tensor."""
        return self.layout.sum(matrix)

    def spread(self, per_tensor: Tensor | float) -> Tensor:
        """A per-tensor quantity, to meet matrices elementwise; a plain number meets them as it is
        (`pace` is one until a technique has changed it)."""
        if isinstance(per_tensor, float):
            return cast(Tensor, per_tensor)
        return self.layout.spread(per_tensor)

    def line_sum(self, matrix: Tensor, axis: Axis) -> Tensor:
        """The sum over each line, per line."""
        return self.layout.line_sum(matrix, axis)

    def line_mean(self, matrix: Tensor, axis: Axis) -> Tensor:
        """The mean over each line, per line."""
        return self.layout.line_mean(matrix, axis)

    def spread_lines(self, lines: Tensor, axis: Axis) -> Tensor:
        """A per-line quantity, to meet matrices elementwise."""
        return self.layout.spread_lines(lines, axis)

    def to_lines(self, per_tensor: Tensor | float, axis: Axis) -> Tensor:
        """A per-tensor quantity, to meet per-line ones of this axis; a plain number as it is."""
        if isinstance(per_tensor, float):
            return cast(Tensor, per_tensor)
        return self.layout.to_lines(per_tensor, axis)

    def mean_of_rows(self, rows: Tensor) -> Tensor:
        """The mean over all rows of a matrix, for each of its rows."""
        return self.layout.mean_of_rows(rows)


class Technique:
    """One link of an optimizer's chain.

    A technique holds its hyper-parameters and nothing else: what it must remember it declares in
    `state` and finds in `Work.state`. What it needs beyond elements and sums it computes before the
    step, in `prepare` or `schedule`, as one factor for each tensor; what it learns of all tensors
    in a step it notes behind it, in `conclude`.
    """

    uses_pair_norm: ClassVar[bool] = False
    steps: range | None = None
    """The steps of a parameter, counted from 1, in which it takes part; None for all. What it keeps
    is kept until they are over."""
    settled: Sequence[Mapping[str, Any]] = ()
    """Where state takes another form: for each that it may take, what of an entry tells `state`
    that it has, and the `step` that is over then. The programs for that are made together with the
    first."""

    def state(self, role: str, entry: Mapping[str, Any], shape: torch.Size) -> dict[str, Kind]:
        """What is kept of a parameter with this role and shape, by name. Everything starts at zero,
        but for the kind `initial`, which is the parameter's value at its first step.

        Args:
            entry: the parameter's state as it is now, after `settle`.
        """
        return {}

    def settles(self, entry: Mapping[str, Any]) -> bool:
        """Whether a parameter's state is to take another form before the next step."""
        return False

    def settle(self, entry: dict[str, Any]) -> None:
        """Give it that form, in place."""

    def prepare(self, overview: Overview) -> Tensor | None:
        """A factor for this step from whole matrices or from all parameters: float64
        `[parameters]` in the order of the overview, or None for one that is 1 for all."""
        return None

    def conclude(self, overview: Overview) -> None:
        """Note what this step has shown of all parameters, as numbers of the overview."""

    def schedule(self, family: str, step: int) -> float:
        """A factor for this step by family (`lora`, `lokr`, `other`), where there is no other."""
        return 1.0

    @property
    def has_factor(self) -> bool:
        """Whether it computes factors before the step."""
        own = type(self)
        return own.prepare is not Technique.prepare or own.schedule is not Technique.schedule

    def apply(self, work: Work) -> None:
        """Change `work` by this technique's rule."""
        raise NotImplementedError
