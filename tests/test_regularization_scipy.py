"""The regularizers against scipy's Laplacian, box filter, Fourier transform and SVD."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import scipy.ndimage
import torch

from library.optim.regularization import (
    BackgroundRegularization,
    EdgeSuppression,
    FrequencyPenalty,
    RankPenalty,
    SpatialAwareness,
)

SHAPES = [(16, 70), (70, 16), (9, 130), (128, 5), (3, 3), (6, 5, 3, 3)]


def planes(g: np.ndarray) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """The matrices over the last two axes, by their place."""
    return [(place, g[place]) for place in np.ndindex(g.shape[:-2])]


def over_planes(g: np.ndarray, function) -> np.ndarray:
    changed = np.empty_like(g)
    for place, plane in planes(g):
        changed[place] = function(plane)
    return changed


def box(x: np.ndarray) -> np.ndarray:
    return over_planes(x, lambda plane: scipy.ndimage.uniform_filter(plane, 3, mode="nearest"))


def edges(g: np.ndarray) -> np.ndarray:
    laplacian = over_planes(g, lambda plane: scipy.ndimage.laplace(plane, mode="nearest"))
    steep = np.abs(laplacian) / np.abs(laplacian).max()
    return np.where(steep > 0.6, 0.9 * g, g)


def frequencies(g: np.ndarray) -> np.ndarray:
    def filtered(plane: np.ndarray) -> np.ndarray:
        along = [np.abs(scipy.fft.fftfreq(length)) > 0.25 for length in plane.shape]
        high = along[0][:, None] | along[1][None]
        return scipy.fft.ifft2(scipy.fft.fft2(plane) * np.where(high, 0.95, 1.0)).real

    return over_planes(g, filtered)


def background(g: np.ndarray) -> np.ndarray:
    size = np.abs(g)
    return g * np.clip(box(size) / (0.5 * size.mean()), 0, 1)


def spatial(g: np.ndarray) -> np.ndarray:
    mean = box(g)
    variance = np.maximum(box(g * g) - mean * mean, 0)
    detail = variance / (variance + variance.mean())
    return mean + (g - mean) * (0.8 + 0.2 * detail)


def rank(g: np.ndarray) -> np.ndarray:
    if g.ndim != 2:
        return g
    u, values, v = scipy.linalg.svd(g, full_matrices=False)
    count = len(values)
    leading = -(-count // 2)
    tail = np.maximum((np.arange(count) - leading + 1) / (count - leading), 0)
    return (u * (values * (1 - np.minimum(1, 0.01 * (1 + 1.2 * tail))))) @ v


CASES = {
    "edges": (EdgeSuppression(0.6, 0.1), edges),
    "frequencies": (FrequencyPenalty(0.05), frequencies),
    "background": (BackgroundRegularization(0.5), background),
    "spatial": (SpatialAwareness(0.8), spatial),
    "rank": (RankPenalty(0.01, 1.2), rank),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_scipy(case, shape):
    strategy, reference = CASES[case]
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    found = strategy.apply(stack, step=1, phase="stable", names=["a", "b", "c"])
    for one, g in zip(found, stack, strict=True):
        expected = reference(g.numpy())
        np.testing.assert_allclose(one.numpy(), expected, atol=1e-10)
        changed = np.abs(expected - g.numpy()).max() > 1e-4
        assert changed or (case == "rank" and len(shape) > 2) or g.numel() == 9
