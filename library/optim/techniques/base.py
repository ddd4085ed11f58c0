"""What a technique is, and what it works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layout import Layout
from ..roles import Roles
from ..state import Kind

TINY = torch.finfo(torch.float32).tiny
"""The smallest normal float32: keeps a division by a sum that may be zero defined."""


@dataclass
class Work:
    """Some tensors of one parameter group, in the middle of one step.

    Matrices are `[blocks, 256]` in the precision of the maths (float32; float64 for float64
    parameters); per-tensor quantities are `[tensors]`. `sum` and `spread` lead from one to the
    other; everything else that a technique does is elementwise. No matrix is changed in place.

    Attributes:
        params: the tensors themselves, to look up what was prepared for them.
        family: `lora`, `lokr` or `other`, the same for all of them.
        step: t, from 1.
        lr, betas, eps, weight_decay: the group's, as the scheduler has set them.
        grad: the gradient as autograd left it.
        g: the gradient as the techniques before have made it.
        p: the parameters before the step.
        u: the update's direction: the step is p − lr·pace·u.
        pace: per-tensor factor on lr.
        new_p: the parameters after the step.
        state: what the techniques keep from step to step, by name.
        prepared: what each technique's `prepare` returned for this step.
        report: per-tensor figures of this step for telemetry.
    """

    params: Sequence[Tensor]
    family: str
    layout: Layout
    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad: Tensor
    g: Tensor
    p: Tensor
    u: Tensor
    pace: Tensor
    new_p: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    prepared: Mapping[Technique, Mapping[Tensor, Tensor]] = field(default_factory=dict)
    report: dict[str, Tensor | float] = field(default_factory=dict)

    def sum(self, *terms: Tensor) -> tuple[Tensor, ...]:
        """Per-tensor sums `[tensors]` of matrices."""
        return self.layout.sum(*terms)

    def spread(self, per_tensor: Tensor) -> Tensor:
        """A per-tensor quantity as `[blocks, 1]`, to meet matrices elementwise."""
        return self.layout.spread(per_tensor)


class Technique:
    """One link of an optimizer's chain.

    A technique holds its hyper-parameters and nothing else: what it must remember it declares in
    `state` and finds in `Work.state`; what needs whole matrices rather than single elements it
    computes in `prepare`, before any parameter moves.
    """

    def state(self, role: str) -> dict[str, Kind]:
        """What is kept of a parameter with this role, by name. Everything starts at zero, but for
        the kind `initial`, which is the parameter's value at its first step."""
        return {}

    def prepare(self, roles: Roles) -> Mapping[Tensor, Tensor]:
        """Per-parameter 0-d factors for this step; parameters left out have none."""
        return {}

    def apply(self, work: Work) -> None:
        """Change `work` by this technique's rule."""
        raise NotImplementedError
