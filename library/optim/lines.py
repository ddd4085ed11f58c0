"""Lines of a tensor: its rows, columns and filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch

Axis = Literal["row", "column", "filter"]
"""What a line is. A tensor of two and more axes is a stack of matrices over its last two (of a
convolution's weight, its kernels): a `row` runs along the last axis, a `column` along the one
before. A `filter` is what belongs to one index of the first axis: a row of a weight as out × rest.
A vector is a matrix of one row, and each of its elements a filter."""

AXES: tuple[Axis, ...] = get_args(Axis)


class Lines(NamedTuple):
    """A tensor seen as `[outer, size, inner]`; its lines lie along the middle.

    Line `o·inner + i` has the elements `[o, :, i]`.
    """

    outer: int
    size: int
    inner: int

    @property
    def number(self) -> int:
        """How many lines there are."""
        return self.outer * self.inner


def lines_of(shape: Sequence[int], axis: Axis) -> Lines:
    """The lines of a tensor that has elements."""
    numel = math.prod(shape)
    if axis == "filter":
        filters = shape[0] if shape else 1
        return Lines(filters, numel // filters, 1)
    width = shape[-1] if shape else 1
    if axis == "row":
        return Lines(numel // width, width, 1)
    height = shape[-2] if len(shape) > 1 else 1
    return Lines(numel // (height * width), height, width)


def shape_of_lines(shape: torch.Size, axis: Axis) -> torch.Size:
    """In which shape a number for each line is kept, as came-pytorch and Adafactor have it."""
    if axis == "filter":
        return shape[:1]
    return shape[:-1] if axis == "row" else torch.Size([*shape[:-2], *shape[-1:]])
