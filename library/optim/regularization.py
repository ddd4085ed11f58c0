"""The gradient regularizers of the CameAMP family, and what a regularizer of one's own looks like.

In the equations g is one parameter's gradient, and maxima and means are over it: of a stack each is
treated as if it came alone. Rows and columns are the last two axes; of a convolution's weight these
are its kernel's. An element's 3×3 neighbourhood and its four neighbours are taken by rows and
columns too; beyond the border its values are repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

_SHORT = 64
"""Up to this length of an axis a matrix product is the fastest way to work along it."""

_RANKS = range(2, 129)
"""The smaller side of the matrices that `RankPenalty` takes for an adapter's halves."""


class RegularizationStrategy:
    """Changes gradients before the optimizer sees them; subclasses implement `apply`.

    Source: spec page 1, §5.

    Attributes:
        batched: False: `apply` gets one parameter's gradient at a time, in the parameter's shape.
            True: it gets a stack `[k, ..., rows, columns]`, the gradients of k parameters of one
            shape of two axes or more, and must treat each as if it came alone; gradients of fewer
            axes are left as they are.
    """

    batched: ClassVar[bool] = False

    def apply(self, grad: Tensor, **context: Any) -> Tensor:
        """The changed gradient, of the same shape and dtype.

        Args:
            grad: the gradient, not to be changed in place. It may be returned itself.
            context: `step` (int), how many steps were taken; `phase` (str), the part of the run as
                the optimizer names it; `names` (list[str]), those of the parameters, in the order
                of the stack. More may come.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement apply().")


@dataclass(frozen=True)
class EdgeSuppression(RegularizationStrategy):
    """g ← (1 − p)·g where |L| > t·max|L|, with L the five-point Laplacian of g. What rounding
    leaves of L where g is even is no edge.

    Source: spec page 1, §5; the Laplacian is the standard second difference.

    Args:
        threshold: t, between 0 and 1.
        penalty: p, from 0 to 1.
    """

    batched: ClassVar[bool] = True
    threshold: float = 0.6
    penalty: float = 0.1

    def apply(self, grad: Tensor, **context: Any) -> Tensor:
        axes = _tensor_axes(grad)
        steepness = _laplacian(grad).abs_()
        limit = self.threshold * steepness.amax(axes, keepdim=True)
        largest = torch.linalg.vector_norm(grad, math.inf, axes, keepdim=True)
        rounding = 8 * torch.finfo(grad.dtype).eps * largest  # of the four additions of L
        edges = steepness.gt_(torch.maximum(limit, rounding))
        return torch.addcmul(grad, grad, edges, value=-self.penalty)


@dataclass(frozen=True)
class FrequencyPenalty(RegularizationStrategy):
    """G ← (1 − p)·G at frequencies above half of Nyquist (|f| > ¼ cycle per element) along the rows
    or the columns, with G the two-dimensional Fourier transform of g.

    Computed as g ← (1 − p)·g + p·low(g), where low keeps the other frequencies.

    Source: spec page 1, §5; the transform is the standard discrete one.

    Args:
        penalty: p, from 0 to 1.
    """

    batched: ClassVar[bool] = True
    penalty: float = 0.05

    def apply(self, grad: Tensor, **context: Any) -> Tensor:
        return _low_pass(grad).lerp_(grad, 1 - self.penalty)


@dataclass(frozen=True)
class BackgroundRegularization(RegularizationStrategy):
    """g ← g·min(1, a/(t·ā)), with a the mean of |g| over the 3×3 neighbourhood and ā that over the
    tensor: regions where little happens are held back in proportion.

    Source: spec page 1, §5; the local mean is the standard box filter.

    Args:
        threshold: t, above 0.
    """

    batched: ClassVar[bool] = True
    threshold: float = 0.5

    def apply(self, grad: Tensor, **context: Any) -> Tensor:
        size = grad.abs()
        full = 9 * self.threshold * size.mean(_tensor_axes(grad), keepdim=True)
        factor = _neighbourhood_sum(size).mul_(_reciprocal(full)).clamp_max_(1)
        return factor.mul_(grad)


@dataclass(frozen=True)
class SpatialAwareness(RegularizationStrategy):
    """g ← m + (g − m)·(d + (1 − d)·v/(v + v̄)), with m and v the mean and the variance of g over the
    3×3 neighbourhood and v̄ the mean of v over the tensor: details stay where there are many;
    elsewhere a share d of what departs from the surroundings does.

    Computed as g ← g + (1 − d)·(m − g)/(v/v̄ + 1).

    Source: spec page 1, §5; the local moments are standard box filters.

    Args:
        detail_preservation: d, from 0 to 1.
    """

    batched: ClassVar[bool] = True
    detail_preservation: float = 0.8

    def apply(self, grad: Tensor, **context: Any) -> Tensor:
        square = _neighbourhood_sum(grad * grad)
        total = _neighbourhood_sum(grad)
        # Nine times the variance, of which rounding can leave less than zero.
        variance = square.addcmul_(total, total, value=-1 / 9).clamp_min_(0)
        variance.mul_(_reciprocal(variance.mean(_tensor_axes(grad), keepdim=True)))
        departure = total.sub_(grad, alpha=9)
        smoothing = (1 - self.detail_preservation) / 9
        return torch.addcdiv(grad, departure, variance.add_(1), value=smoothing)


@dataclass(frozen=True)
class RankPenalty(RegularizationStrategy):
    """σᵢ ← σᵢ·(1 − min(1, s·(1 + e·xᵢ))), with σ₀ ≥ σ₁ ≥ … the r singular values of g, and xᵢ = 0
    for the leading k = ⌈r/2⌉, behind them (i − k + 1)/(r − k): the last decay the most.

    r is the smaller side of a matrix; where it is not between 2 and 128 (an adapter's halves), and
    of a convolution's weight, the gradient stays as it is. Computed as g ← g − U·diag(decay)·Uᵀ·g,
    with U the eigenvectors of the r×r Gram matrix gᵀg or ggᵀ. Where singular values are equal it is
    open which of their vectors decay more.

    Source: spec page 1, §5; that the Gram matrix has the singular vectors is standard.

    Args:
        strength: s, from 0 to 1.
        emphasis: e, 0 or more.
    """

    batched: ClassVar[bool] = True
    strength: float = 0.01
    emphasis: float = 1.2

    def apply(self, grad: Tensor, **context: Any) -> Tensor:
        if grad.dim() != 3 or min(grad.shape[-2:]) not in _RANKS:
            return grad
        if _is_tall(grad):
            return torch.baddbmm(grad, grad, self._decayed(grad.mT @ grad), alpha=-1)
        return torch.baddbmm(grad, self._decayed(grad @ grad.mT), grad, alpha=-1)

    def _decayed(self, gram: Tensor) -> Tensor:
        """U·diag(decay)·Uᵀ `[k, r, r]`."""
        rank = gram.shape[-1]
        leading = (rank + 1) // 2
        place = torch.arange(rank, dtype=gram.dtype, device=gram.device)
        tail = ((place - leading + 1) / (rank - leading)).clamp_min(0)
        decay = (self.strength * (1 + self.emphasis * tail)).clamp_max(1)
        vectors = torch.linalg.eigh(gram).eigenvectors  # the smallest eigenvalue's comes first
        return (vectors * decay.flip(0)) @ vectors.mT


def _tensor_axes(stack: Tensor) -> tuple[int, ...]:
    return tuple(range(1, stack.dim()))


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _reciprocal(x: Tensor) -> Tensor:
    """1/x of numbers that are not negative; of 0 a number, which what is all 0 may be times."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).reciprocal()


def _one_product(operator: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A linear operator on rows and columns, as one matrix product where these are few.

    Millions of 3×3 kernels are otherwise gone through in strides of three.
    """

    @cache
    def matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        units = torch.eye(rows * columns, dtype=dtype, device=device)
        return operator(units.unflatten(1, (rows, columns))).flatten(1)

    @wraps(operator)
    def operate(x: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        if rows * columns > _SHORT:
            return operator(x)
        product = x.flatten(-2) @ matrix(rows, columns, x.dtype, x.device)
        return product.unflatten(-1, (rows, columns))

    return operate


@_one_product
def _laplacian(x: Tensor) -> Tensor:
    """The sum of an element's four neighbours less four times itself: 0 of what is constant."""
    return _three_points(x, -2, -2).add_(_three_points(x, -1, -2))


@_one_product
def _neighbourhood_sum(x: Tensor) -> Tensor:
    """The sum over each element's 3×3 neighbourhood."""
    return _three_points(_three_points(x, -2, 1), -1, 1)


def _three_points(x: Tensor, axis: int, centre: float) -> Tensor:
    """xᵢ₋₁ + centre·xᵢ + xᵢ₊₁ along the last axis (-1) or the one before (-2)."""
    length = x.shape[axis]
    if length <= _SHORT:
        matrix = _three_point_matrix(length, centre, x.dtype, x.device)
        return x @ matrix if axis == -1 else matrix @ x
    total = torch.empty_like(x)
    inner = total.narrow(axis, 1, length - 2)
    before, here, after = (x.narrow(axis, start, length - 2) for start in range(3))
    torch.add(before, here, alpha=centre, out=inner).add_(after)
    for border, next_to_it in ((0, 1), (-1, -2)):
        outermost, neighbour = x.select(axis, border), x.select(axis, next_to_it)
        torch.add(neighbour, outermost, alpha=centre + 1, out=total.select(axis, border))
    return total


@cache
def _three_point_matrix(
    length: int, centre: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`[length, length]`, symmetric."""
    matrix = centre * torch.eye(length, dtype=dtype, device=device)
    beside = torch.ones(length - 1, dtype=dtype, device=device)
    matrix += beside.diag(1) + beside.diag(-1)
    for border in (0, -1):
        matrix[border, border] += 1
    return matrix


@_one_product
def _low_pass(x: Tensor) -> Tensor:
    """What of x has no frequency above half of Nyquist along the rows or the columns.

    The projection separates by axis. Along a short one it is BᵀB with a real basis B of the low
    frequencies: in it half of the rows are left for the Fourier transforms along the other axis.
    """
    short = min(x.shape[-2:])
    if short > _SHORT:
        return _low_along_last(_low_along_last(x).mT).mT
    basis = _low_basis(short, x.dtype, x.device)
    if _is_tall(x):
        return _low_along_last(basis @ x.mT).mT @ basis
    return basis.mT @ _low_along_last(basis @ x)


def _low_along_last(x: Tensor) -> Tensor:
    length = x.shape[-1]
    spectrum = torch.fft.rfft(x)
    spectrum[..., length // 4 + 1 :] = 0
    return torch.fft.irfft(spectrum, n=length)


@cache
def _low_basis(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal cosines and sines of up to half of Nyquist, `[2·⌊length/4⌋ + 1, length]`."""
    turn = 2 * math.pi / length * torch.arange(length, dtype=torch.float64)
    angles = torch.arange(1, length // 4 + 1, dtype=torch.float64)[:, None] * turn
    waves = torch.cat([torch.full_like(turn[None], 0.5**0.5), angles.cos(), angles.sin()])
    return (waves * (2 / length) ** 0.5).to(device, dtype)
