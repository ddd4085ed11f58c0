"""Names for the tensors of parameter groups, found by tensor identity.

Optimizers that treat LoRA or LoKr halves differently need to know which tensor is which, and the
network modules that make parameter groups rarely say. This works for every network module: the
tensors it handed out are looked up in `network.named_parameters()`.

This file is copied into other trees and imports nothing of this project.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def name_groups(
    network: nn.Module, groups: Iterable[dict[str, Any] | Tensor]
) -> list[dict[str, Any]]:
    """The parameter groups with a name for every tensor, in `group["named"]`.

    `group["params"]` may be a tensor, a list or any other iterable of tensors (a generator is read
    once); it comes back as a list, and `group["named"]` is as long. A bare sequence of tensors is
    one group, as for `torch.optim`. Other keys (`lr`, …) are kept, and the groups that were passed
    are left as they are.

    A tensor that is no parameter of `network` (one that the network module keeps outside of it)
    is named by where it stands: `group0.param3`. Optimizers take such a name for a regular
    parameter.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [_with_names(group, index, names) for index, group in enumerate(_as_dicts(list(groups)))]


def is_of_network(name: str) -> bool:
    """Whether `name_groups` found it in the network; not so where it had to count."""
    return bool(name) and re.fullmatch(r"group\d+\.param\d+", name) is None


def _as_dicts(groups: list[dict[str, Any] | Tensor]) -> list[dict[str, Any]]:
    if any(isinstance(group, dict) for group in groups):
        wrong = [type(group).__name__ for group in groups if not isinstance(group, dict)]
        if wrong:
            raise TypeError(f"parameter groups are dicts, or all are tensors; got also {wrong[0]}")
        return [group for group in groups if isinstance(group, dict)]
    return [{"params": groups}] if groups else []


def _with_names(group: dict[str, Any], index: int, names: dict[int, str]) -> dict[str, Any]:
    params = group["params"]
    tensors = [params] if hasattr(params, "requires_grad") else list(params)
    named = [
        names.get(id(tensor), f"group{index}.param{position}")
        for position, tensor in enumerate(tensors)
    ]
    return {**group, "params": tensors, "named": named}
