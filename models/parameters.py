"""A model's parameters as the list of NumPy arrays that federated learning hands around."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def as_arrays(named: Mapping[str, Tensor]) -> list[np.ndarray]:
    """The values, in order, copied: what the caller does to them leaves the model alone."""
    return [_widened(tensor.detach()).cpu().numpy().copy() for tensor in named.values()]


def load_arrays(named: Mapping[str, Tensor], arrays: Sequence[np.ndarray]) -> None:
    """Write `arrays`, in the order of `as_arrays`, into the tensors.

    Raises:
        ValueError: another count, a shape that does not fit, or a value that is not a finite
            number; names the tensor. Nothing has been changed then.
    """
    if len(arrays) != len(named):
        raise ValueError(f"expected {len(named)} arrays of parameters, got {len(arrays)}")
    values = [
        _checked(name, tensor, array)
        for (name, tensor), array in zip(named.items(), arrays, strict=True)
    ]
    with torch.no_grad():
        for tensor, value in zip(named.values(), values, strict=True):
            tensor.copy_(value)


def _widened(tensor: Tensor) -> Tensor:
    """NumPy has no bfloat16."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def refuse_nonfinite(named: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ValueError: a tensor holds NaN or infinity; names it.
    """
    for name, tensor in named.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(f"'{name}' holds {bad} values that are NaN or infinite")


def _checked(name: str, tensor: Tensor, array: np.ndarray) -> Tensor:
    array = np.asarray(array)
    if array.shape != tuple(tensor.shape):
        raise ValueError(f"'{name}' has the shape {tuple(tensor.shape)}, got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"'{name}' takes numbers, got an array of {array.dtype}")
    # A copy: what came over the wire is read-only. What overflows the tensor's type is infinite.
    value = torch.from_numpy(np.array(array)).to(tensor.dtype)
    refuse_nonfinite({name: value})
    return value
