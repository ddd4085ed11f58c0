"""Aspect-ratio buckets: which size a picture is trained at.

A bucket is a size whose sides are multiples of a step and whose area is at most that of the
resolution. A picture is scaled to cover its bucket and what sticks out is cropped, so batches of
one size each keep the pictures' shapes. The choice is that of sd-scripts, so that a dataset falls
into the same buckets here. All sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """What becomes of a picture: it is scaled to `resized`, then cropped to `bucket`."""

    bucket: Size
    resized: Size


@dataclass(frozen=True)
class Buckets:
    """The rule by which pictures of any size are placed.

    With `no_upscale` the buckets are not a fixed list: a picture that has less area than the
    resolution keeps its size, cropped to whole steps, and only larger ones are shrunk.
    """

    resolution: Size
    min_size: int = 256
    max_size: int = 1024
    steps: int = 64
    no_upscale: bool = False

    @cached_property
    def sizes(self) -> list[Size]:
        """The buckets there are when upscaling is allowed, in ascending order."""
        area = self.resolution[0] * self.resolution[1]
        square = self._down(math.sqrt(area))
        found = {(square, square)}
        for width in range(self.min_size, self.max_size + 1, self.steps):
            height = min(self.max_size, self._down(area // width))
            if height >= self.min_size:
                found |= {(width, height), (height, width)}
        return sorted(found)

    def place(self, size: Size) -> Placement:
        """The placement of a picture of `size`; ValueError says why there is none."""
        return self._place_without_upscaling(size) if self.no_upscale else self._place(size)

    def _place(self, size: Size) -> Placement:
        aspect = size[0] / size[1]
        if size in self.sizes:
            bucket = size
        else:
            bucket = min(self.sizes, key=lambda each: abs(each[0] / each[1] - aspect))
        return Placement(bucket, cover(size, bucket))

    def _place_without_upscaling(self, size: Size) -> Placement:
        area = self.resolution[0] * self.resolution[1]
        resized = self._shrink(size) if size[0] * size[1] > area else size
        bucket = (self._down(resized[0]), self._down(resized[1]))
        if 0 in bucket:
            raise ValueError(
                f"{size[0]}×{size[1]} is too small or too narrow for bucket_no_upscale with "
                f"bucket_reso_steps {self.steps}: use smaller steps, or allow upscaling"
            )
        return Placement(bucket, resized)

    def _shrink(self, size: Size) -> Size:
        """`size` at about the area of the resolution, one side a whole number of steps.

        Of the two ways (whole width, whole height) the one that keeps the shape better.
        """
        aspect = size[0] / size[1]
        width = math.sqrt(self.resolution[0] * self.resolution[1] * aspect)
        whole_width = self._nearest(width)
        whole_height = self._nearest(width / aspect)
        by_width = (whole_width, self._nearest(whole_width / aspect))
        by_height = (self._nearest(whole_height * aspect), whole_height)
        if _shape_error(by_width, aspect) < _shape_error(by_height, aspect):
            return whole_width, int(whole_width / aspect + 0.5)
        return int(whole_height * aspect + 0.5), whole_height

    def _down(self, length: float) -> int:
        return int(length // self.steps) * self.steps

    def _nearest(self, length: float) -> int:
        return self._down(int(length + 0.5))


def _shape_error(size: Size, aspect: float) -> float:
    return abs(size[0] / size[1] - aspect) if size[1] else math.inf


def cover(size: Size, target: Size) -> Size:
    """The smallest scaling of `size` that covers `target`."""
    if size[0] * target[1] > target[0] * size[1]:  # wider than the target: match the height
        scale = target[1] / size[1]
    else:
        scale = target[0] / size[0]
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def place_fixed(size: Size, resolution: Size, random_crop: bool) -> Placement:
    """The placement without buckets: everything is trained at one resolution.

    With `random_crop` a picture that is large enough keeps its scale, so that the crops show its
    details; any other is scaled to cover the resolution.
    """
    large_enough = size[0] >= resolution[0] and size[1] >= resolution[1]
    return Placement(resolution, size if random_crop and large_enough else cover(size, resolution))
