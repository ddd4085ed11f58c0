"""The gradient regularizers, held against references in numpy that say what they do directly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from library.optim.regularization import (
    BackgroundRegularization,
    EdgeSuppression,
    FrequencyPenalty,
    RankPenalty,
    RegularizationStrategy,
    SpatialAwareness,
)

Array = NDArray[np.float64]

NEIGHBOURHOOD = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]


def shifted(x: Array, down: int, right: int) -> Array:
    """The neighbour so far away of each element, or the nearest one there is."""
    rows = np.clip(np.arange(x.shape[-2]) + down, 0, x.shape[-2] - 1)
    columns = np.clip(np.arange(x.shape[-1]) + right, 0, x.shape[-1] - 1)
    return x[..., rows, :][..., columns]


def local_mean(x: Array) -> Array:
    return np.mean([shifted(x, *by) for by in NEIGHBOURHOOD], axis=0)


def edginess(x: Array) -> Array:
    """|Laplacian|, as a share of the largest."""
    across = np.add(shifted(x, 1, 0), shifted(x, -1, 0)) - 2 * x
    along = np.add(shifted(x, 0, 1), shifted(x, 0, -1)) - 2 * x
    steepness = np.abs(across + along)
    return steepness / (steepness.max() or 1)


def edge_suppression(x: Array, threshold: float = 0.6, penalty: float = 0.1) -> Array:
    return np.where(edginess(x) > threshold, x * (1 - penalty), x)


def frequency_penalty(x: Array, penalty: float = 0.05) -> Array:
    high_rows = np.abs(np.fft.fftfreq(x.shape[-2]))[:, None] > 0.25
    high_columns = np.abs(np.fft.fftfreq(x.shape[-1]))[None, :] > 0.25
    kept = np.where(high_rows | high_columns, 1 - penalty, 1)
    return np.fft.ifft2(np.fft.fft2(x) * kept).real


def background_regularization(x: Array, threshold: float = 0.5) -> Array:
    mean = np.abs(x).mean() or 1
    return x * np.clip(local_mean(np.abs(x)) / (threshold * mean), 0, 1)


def spatial_awareness(x: Array, detail_preservation: float = 0.8) -> Array:
    mean = local_mean(x)
    variance = np.mean([np.square(shifted(x, *by) - mean) for by in NEIGHBOURHOOD], axis=0)
    detail = variance / (variance + (variance.mean() or 1))
    return mean + (x - mean) * (detail_preservation + (1 - detail_preservation) * detail)


def rank_penalty(x: Array, strength: float = 0.01, emphasis: float = 1.2) -> Array:
    rank = min(x.shape[-2:])
    if x.ndim != 2 or not 2 <= rank <= 128:
        return x
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    leading = math.ceil(rank / 2)
    for i in range(rank):
        place = 0.0 if i < leading else (i - leading + 1) / (rank - leading)
        sigma[i] *= 1 - min(1.0, strength * (1 + emphasis * place))
    return (u * sigma) @ vt


REFERENCES: list[tuple[type[RegularizationStrategy], Callable[..., Array], dict[str, float]]] = [
    (EdgeSuppression, edge_suppression, {"threshold": 0.3, "penalty": 0.7}),
    (FrequencyPenalty, frequency_penalty, {"penalty": 0.6}),
    (BackgroundRegularization, background_regularization, {"threshold": 1.2}),
    (SpatialAwareness, spatial_awareness, {"detail_preservation": 0.1}),
    (RankPenalty, rank_penalty, {"strength": 0.4, "emphasis": 3.0}),
]
with_reference = pytest.mark.parametrize(("strategy", "reference", "others"), REFERENCES)
of_each = pytest.mark.parametrize("strategy", [row[0] for row in REFERENCES])

MATRICES = [(16, 200), (201, 16), (7, 33), (20, 30), (66, 71), (80, 65), (130, 129)]
THIN = [(1, 90), (90, 1), (1, 1), (2, 70), (3, 5), (6, 2)]
KERNELS = [(6, 5, 3, 3), (6, 5, 1, 1), (3, 2, 5, 4), (2, 3, 9, 9), (4, 6, 3), (2, 3, 3, 3, 2)]


def gradients(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """A stack of gradients that are calm in some places and lively in others, as real ones are."""
    torch.manual_seed(len(shape) + sum(shape))
    liveliness = torch.rand(count, *shape, dtype=torch.float64) ** 3
    return (torch.randn(count, *shape, dtype=torch.float64) * liveliness * 1e-3).to(dtype)


def relative_error(found: Tensor, expected: Array) -> float:
    return float(np.abs(found.double().numpy() - expected).max() / np.abs(expected).max())


@with_reference
@pytest.mark.parametrize("shape", [*MATRICES, *THIN, *KERNELS], ids=str)
def test_each_parameter_of_a_stack_gets_what_the_reference_says(
    strategy: type[RegularizationStrategy],
    reference: Callable[..., Array],
    others: dict[str, float],
    shape: tuple[int, ...],
) -> None:
    stack = gradients(3, shape)
    for arguments in ({}, others):
        changed = strategy(**arguments).apply(stack)
        for one, grad in zip(changed, stack, strict=True):
            assert relative_error(one, reference(grad.numpy(), **arguments)) < 1e-11


@with_reference
@pytest.mark.parametrize("shape", [(16, 640), (640, 16), (70, 90), (32, 16, 3, 3)], ids=str)
def test_in_float32_within_rounding(
    strategy: type[RegularizationStrategy],
    reference: Callable[..., Array],
    others: dict[str, float],
    shape: tuple[int, ...],
) -> None:
    grad = gradients(1, shape, torch.float32)
    changed = strategy().apply(grad)
    assert changed.dtype == torch.float32
    exact = grad[0].double().numpy()
    if strategy is EdgeSuppression:  # at the threshold itself rounding decides
        clear = np.abs(edginess(exact) - 0.6) > 1e-5
        assert clear.mean() > 0.99
        changed, exact = changed * torch.from_numpy(clear), exact * clear
        expected = edge_suppression(grad[0].double().numpy()) * clear
    else:
        expected = reference(exact)
    assert relative_error(changed[0], expected) < 2e-6


@of_each
@pytest.mark.parametrize("shape", [(16, 100), (100, 16), (70, 80), (4, 3, 3, 3)], ids=str)
def test_zeros_stay_and_are_nothing_to_their_neighbours(
    strategy: type[RegularizationStrategy], shape: tuple[int, ...]
) -> None:
    stack = gradients(3, shape, torch.float32)
    stack[1] = 0
    changed = strategy().apply(stack)
    assert torch.equal(changed[1], stack[1])
    alone = strategy().apply(stack[2:])
    torch.testing.assert_close(changed[2:], alone, rtol=1e-5, atol=1e-9)


@of_each
@pytest.mark.parametrize("shape", [(16, 100), (100, 16), (70, 80), (4, 3, 3, 3)], ids=str)
def test_the_gradient_itself_is_not_changed(
    strategy: type[RegularizationStrategy], shape: tuple[int, ...]
) -> None:
    stack = gradients(2, shape, torch.float32)
    before = stack.clone()
    changed = strategy().apply(stack, step=3, phase="stable", names=["a", "b"])
    assert torch.equal(stack, before)
    assert changed.shape == stack.shape


@of_each
def test_strides_do_not_matter(strategy: type[RegularizationStrategy]) -> None:
    for shape in ((100, 16), (4, 5, 3, 3)):
        stack = gradients(2, shape).mT
        torch.testing.assert_close(strategy().apply(stack), strategy().apply(stack.contiguous()))


@pytest.mark.parametrize("shape", [(16, 100), (100, 16), (70, 80), (4, 3, 3, 3)], ids=str)
def test_a_constant_gradient_has_no_edges(shape: tuple[int, ...]) -> None:
    stack = torch.full((2, *shape), 0.1)
    assert torch.equal(EdgeSuppression().apply(stack), stack)


def test_edges_of_a_gradient_do_not_depend_on_its_size() -> None:
    stack = torch.randn(2, 9, 100, generator=torch.Generator().manual_seed(0))
    changed = EdgeSuppression().apply(stack)
    assert not torch.equal(changed, stack)
    for size in (2.0**-80, 2.0**80):
        assert torch.equal(EdgeSuppression().apply(stack * size), changed * size)


@pytest.mark.parametrize("length", [8, 9, 100, 101])
def test_a_quarter_cycle_per_element_is_the_highest_frequency_that_is_kept(length: int) -> None:
    place = torch.arange(length, dtype=torch.float64)
    for cycles in range(length // 2 + 1):
        wave = torch.cos(2 * math.pi * cycles / length * place)
        expected = wave if 4 * cycles <= length else 0.5 * wave
        changed = FrequencyPenalty(penalty=0.5).apply(wave.expand(1, 16, length))
        torch.testing.assert_close(changed, expected.expand(1, 16, length))
        changed = FrequencyPenalty(penalty=0.5).apply(wave[:, None].expand(1, length, 90))
        torch.testing.assert_close(changed, expected[:, None].expand(1, length, 90))


@pytest.mark.parametrize("offset", [1.0, -30.0])
def test_details_end_between_themselves_and_their_surroundings(offset: float) -> None:
    """Also where the variance is nothing beside the square of the mean: rounding then leaves some
    variances negative."""
    grad = offset * (1 + gradients(1, (16, 300), torch.float32) * 0.3)
    mean = torch.from_numpy(local_mean(grad.double().numpy()))
    before, after = grad - mean, SpatialAwareness(0.5).apply(grad) - mean
    rounding = 1e-6 * abs(offset)
    assert (after.abs() <= before.abs() + rounding).all()
    assert (after * before.sign() >= 0.5 * before.abs() - rounding).all()


def test_of_diagonal_matrices_the_singular_values_are_seen() -> None:
    sigma = torch.tensor([7.0, 6.0, 5.0, 4.0, 3.0], dtype=torch.float64)
    grad = torch.zeros(1, 5, 90, dtype=torch.float64)
    grad[0, range(5), range(5)] = sigma.flip(0)
    changed = RankPenalty(strength=0.1, emphasis=2.0).apply(grad)
    kept = torch.tensor([0.9, 0.9, 0.9, 0.8, 0.7], dtype=torch.float64)
    torch.testing.assert_close(changed[0, range(5), range(5)], (sigma * kept).flip(0))


def test_decay_ends_at_zero() -> None:
    grad = gradients(1, (4, 90))
    changed = RankPenalty(strength=0.6, emphasis=5.0).apply(grad)
    assert torch.linalg.matrix_rank(grad) == 4
    assert torch.linalg.matrix_rank(changed) == 2


class SignOnly(RegularizationStrategy):
    def apply(self, grad: Tensor, **context: Any) -> Tensor:
        return grad.sign() if context["phase"] == "mature" else grad


def test_a_strategy_of_ones_own_needs_apply_alone() -> None:
    grad = torch.tensor([-2.0, 0.0, 3.0])
    own = SignOnly()
    assert not own.batched
    assert own.apply(grad, step=1, phase="stable", names=["a"]) is grad
    assert own.apply(grad, step=9, phase="mature", names=["a"]).tolist() == [-1, 0, 1]


def test_a_strategy_without_apply_says_so() -> None:
    class Forgotten(RegularizationStrategy):
        pass

    with pytest.raises(NotImplementedError, match=r"Forgotten does not implement apply"):
        Forgotten().apply(torch.ones(2))
