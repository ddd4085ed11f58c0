"""From a picture as an array (height, width, 3) of bytes to a tensor (3, height, width)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import functional

__all__ = ["Compose", "Normalize", "ToTensor", "functional"]


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, picture: Any) -> Any:
        for transform in self.transforms:
            picture = transform(picture)
        return picture


class ToTensor:
    """Bytes 0 to 255 as numbers 0 to 1, channels first."""

    def __call__(self, picture: Any) -> Tensor:
        array = torch.from_numpy(np.ascontiguousarray(picture))
        return array.permute(2, 0, 1).float().div(255)


class Normalize:
    """(x - mean) / std for each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, picture: Tensor) -> Tensor:
        return (picture - self.mean) / self.std
