"""Several processes that train one adapter: the same gradients, hence the same weights, in each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, nn


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace each gradient by its mean over the processes, in one exchange per dtype.

    One flat tensor instead of two thousand small messages. A parameter without a gradient in some
    process (module dropout) counts as zero there; one without a gradient in any keeps none.
    """
    if accelerator.num_processes == 1:
        return
    device = accelerator.device
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    present = reduce(present.to(device), "sum").cpu()
    used = [p for p, count in zip(parameters, present.tolist(), strict=True) if count > 0]
    for dtype in dict.fromkeys(p.dtype for p in used):  # in the same order in every process
        group = [p for p in used if p.dtype == dtype]
        flat = torch.cat([_gradient(p).reshape(-1) for p in group])
        flat = reduce(flat, "mean")
        for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            parameter.grad = part.view_as(parameter).clone()


def broadcast_parameters(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the first one's initial weights."""
    if accelerator.num_processes == 1:
        return
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(broadcast(parameter.detach().clone()))


def mean_over_processes(value: Tensor, accelerator: Accelerator) -> Tensor:
    """The mean of a tensor over the processes."""
    if accelerator.num_processes == 1:
        return value
    averaged: Tensor = reduce(value.detach().clone(), "mean")
    return averaged


def gather(entry: object, accelerator: Accelerator) -> list[object]:
    """`entry` of every process, in the order of their ranks."""
    if accelerator.num_processes == 1:
        return [entry]
    gathered: list[object] = gather_object([entry])
    return gathered


def _gradient(parameter: nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
