"""Rows, columns and filters: the lines of a technique that use them, on both backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from optimizers import each_backend, hina
from torch import Tensor, nn

from library.optim.lines import AXES, lines_of, shape_of_lines
from library.optim.native.graph import UntranslatableError
from library.optim.state import Kind
from library.optim.techniques import Descent, Technique, Work

# Rows of every width that has a way of its own (2, 4, 8, 16, whole blocks), and of none; rows that
# end within a block and blocks that end within a row; stacks; one large enough to be shared.
SHAPES = [(300, 2), (129, 4), (70, 8), (50, 16), (16, 300), (7, 13), (3, 512), (33, 12), (600,)]
SHAPES += [(5, 4, 3, 3), (6, 5, 1, 1), (9, 8, 2, 2), (4, 3, 16, 16), (2, 3, 40), (1, 5), (5, 1)]
LARGE = [(1200, 450), (450, 1200), (40000, 16), (300, 200, 3, 3)]


def along(x: Tensor, axis: str) -> Tensor:
    """As `[outer, size, inner]`, written out by axis."""
    if axis == "filter":
        return x.reshape(x.shape[0], -1, 1)
    if axis == "row":
        return x.reshape(-1, x.shape[-1], 1)
    height = x.shape[-2] if x.ndim > 1 else 1
    return x.reshape(-1, height, x.shape[-1])


def spread(lines: Tensor, x: Tensor, axis: str) -> Tensor:
    whole = along(x, axis)
    return lines.expand(whole.shape).reshape(x.shape)


class OneLine(Technique):
    def __init__(self, line: Callable[[Work], Tensor], state: Mapping[str, Kind] | None = None):
        self.line, self.kept = line, dict(state or {})

    def state(self, role: str, entry: Mapping[str, Any], shape: torch.Size) -> dict[str, Kind]:
        return self.kept

    def apply(self, work: Work) -> None:
        work.u = self.line(work)


def after_steps(
    backend: str,
    line: Callable[[Work], Tensor],
    shapes: list[tuple[int, ...]],
    state: Mapping[str, Kind] | None = None,
    steps: int = 1,
) -> list[Tensor]:
    """What a line of a technique gives, read off the step at lr 1."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    named = [(f"{k}.weight", p) for k, p in enumerate(params)]
    optimizer = hina(named, backend, optim_bits=32, lr=1.0, weight_decay=0.0)
    optimizer.chain = (OneLine(line, state), Descent())
    for step in range(steps):
        for p, grad in zip(params, gradients(shapes, step), strict=True):
            p.grad = grad
            p.data.zero_()
        optimizer.step()
    return [-p.detach() for p in params]


def gradients(shapes: list[tuple[int, ...]], step: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


CASES = [(backend, axis) for backend in ("compiled", "eager") for axis in AXES]


@pytest.mark.parametrize(("backend", "axis"), CASES)
def test_sums_over_lines_and_back(backend, axis):
    shapes = SHAPES + (LARGE if backend == "compiled" else [])
    found = after_steps(backend, lambda w: w.spread_lines(w.line_sum(w.g, axis), axis), shapes)
    for g, one in zip(gradients(shapes), found, strict=True):
        expected = spread(along(g.double(), axis).sum(1, keepdim=True), g, axis)
        assert (one - expected).abs().max() < 2e-6 * along(g, axis).shape[1], tuple(g.shape)


def several(w: Work) -> Tensor:
    """Means of the same matrix over two axes, numbers of the tensor among those of lines, and the
    mean over rows."""
    square = w.g * w.g
    rows, columns = w.line_mean(square, "row"), w.line_mean(square, "column")
    total = w.sum(w.g.abs()) / w.numel
    share = rows / w.mean_of_rows(rows) * w.to_lines(total, "row")
    scaled = (columns + w.to_lines(w.lr, "column")).rsqrt()
    return w.g * w.spread_lines(share, "row") * w.spread_lines(scaled, "column")


@each_backend
def test_lines_of_two_axes_meet_numbers_of_the_tensor(backend):
    shapes = SHAPES + (LARGE if backend == "compiled" else [])
    for g, one in zip(gradients(shapes), after_steps(backend, several, shapes), strict=True):
        g = g.double()
        rows = along(g * g, "row").mean(1, keepdim=True)
        height = along(g, "column").shape[1]
        mean = rows.view(-1, height).mean(1, keepdim=True).expand(-1, height).reshape(rows.shape)
        share = rows / mean * g.abs().mean()
        scaled = (along(g * g, "column").mean(1, keepdim=True) + 1).rsqrt()
        expected = g * spread(share, g, "row") * spread(scaled, g, "column")
        error = (one - expected).abs().max() / expected.abs().max()
        assert error < 3e-6, tuple(g.shape)


def keeps_lines(w: Work) -> Tensor:
    for axis, kind in (("row", "rows"), ("column", "columns")):
        mean = w.line_mean(w.g * w.g, axis)
        w.state[kind] = 0.5 * w.state[kind] + mean
    return w.spread_lines(w.state["rows"], "row") + w.spread_lines(w.state["columns"], "column")


@each_backend
def test_lines_are_kept_from_step_to_step(backend):
    state: dict[str, Kind] = {"rows": "row", "columns": "column"}
    found = after_steps(backend, keeps_lines, SHAPES, state, steps=3)
    for k, one in enumerate(found):
        expected = torch.zeros(SHAPES[k], dtype=torch.float64)
        for step in range(3):
            g = gradients(SHAPES, step)[k].double()
            terms = [spread(along(g * g, a).mean(1, keepdim=True), g, a) for a in AXES[:2]]
            expected = 0.5 * expected + sum(terms)
        assert (one - expected).abs().max() < 1e-5


def mean_is_kept(w: Work) -> Tensor:
    rows = w.line_mean(w.g * w.g, "row")
    old, w.state["rows"] = w.state["rows"], rows
    return w.spread_lines(old + rows, "row")


def mean_of_rows_is_kept(w: Work) -> Tensor:
    mean = w.mean_of_rows(w.line_mean(w.g * w.g, "row"))
    old, w.state["rows"] = w.state["rows"], mean
    return w.spread_lines(old + mean, "row")


def old_rows_are_spread(w: Work) -> Tensor:
    old = w.state["rows"]
    w.state["rows"] = 0.5 * old + w.line_mean(w.g * w.g, "row")
    return w.spread_lines(old, "row") + w.spread_lines(w.mean_of_rows(old), "row")


def old_rows_meet_the_mean_of_new(w: Work) -> Tensor:
    old = w.state["rows"]
    w.state["rows"] = 0.5 * old + w.line_mean(w.g * w.g, "row")
    return w.spread_lines(old * w.mean_of_rows(w.state["rows"]) + w.to_lines(0.5, "row"), "row")


def rows_change_places(w: Work) -> Tensor:
    old, other = w.state["rows"], w.state["others"]
    w.state["rows"], w.state["others"] = 0.5 * old + w.line_mean(w.g * w.g, "row"), old
    return w.spread_lines(w.state["rows"] + 2.0 * other, "row")


@pytest.mark.parametrize(
    "line",
    [
        mean_is_kept,
        mean_of_rows_is_kept,
        old_rows_are_spread,
        old_rows_meet_the_mean_of_new,
        rows_change_places,
    ],
)
def test_old_and_new_rows_can_be_used_anywhere(line):
    state: dict[str, Kind] = {"rows": "row", "others": "row"}
    compiled, eager = (after_steps(b, line, SHAPES, state, steps=3) for b in ("compiled", "eager"))
    for k, (one, expected) in enumerate(zip(compiled, eager, strict=True)):
        assert expected.any(), SHAPES[k]
        assert torch.allclose(one, expected, rtol=1e-5, atol=1e-6), SHAPES[k]


def test_shapes_of_lines():
    shape = torch.Size([6, 5, 3, 2])
    assert [lines_of(shape, axis) for axis in AXES] == [(90, 2, 1), (30, 3, 2), (6, 30, 1)]
    kept = [tuple(shape_of_lines(shape, axis)) for axis in AXES]
    assert kept == [(6, 5, 3), (6, 5, 2), (6,)]
    assert [lines_of(torch.Size([]), axis).number for axis in AXES] == [1, 1, 1]
    assert [lines_of(torch.Size([4]), axis).number for axis in AXES] == [1, 4, 4]


REFUSED: dict[str, tuple[Callable[[Work], Tensor], str]] = {
    "lines meet a matrix": (lambda w: w.g * w.line_sum(w.g, "row"), "per-line.*meets a matrix"),
    "lines of two axes": (
        lambda w: w.spread_lines(w.line_sum(w.g, "row") + w.line_sum(w.g, "column"), "row"),
        "meets a matrix, or one of other lines",
    ),
    "another axis": (
        lambda w: w.g * w.spread_lines(w.line_sum(w.g, "row"), "column"),
        "no quantity per column",
    ),
    "number not spread": (
        lambda w: w.spread_lines(w.line_sum(w.g, "row") * w.lr, "row"),
        "per-tensor quantity meets",
    ),
    "number spread to matrices": (
        lambda w: w.spread_lines(w.line_sum(w.g, "row") * w.spread(w.lr), "row"),
        "meets a matrix, or one of other lines",
    ),
    "sum of lines": (lambda w: w.g * w.spread(w.sum(w.line_sum(w.g, "row"))), "Only matrices"),
    "mean of columns": (
        lambda w: w.spread_lines(w.mean_of_rows(w.line_sum(w.g, "column")), "column"),
        "no quantity per row",
    ),
    "a matrix kept as rows": (lambda w: w.state.update(rows=w.g) or w.g, "'rows' has to be a qua"),
}


@each_backend
@pytest.mark.parametrize(("line", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_would_mix_lines_up_is_refused(backend, line, message):
    with pytest.raises(UntranslatableError, match=message):
        after_steps(backend, line, [(4, 5)], {"rows": "row"})
