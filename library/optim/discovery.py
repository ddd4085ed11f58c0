"""Which matrices are multiplied with one another, found without names.

If a model uses P and Q only as the product P·Q, it does not change when P becomes P·M and Q becomes
M⁻¹·Q. The gradients know of it: dP = G·Qᵀ and dQ = Pᵀ·G, where G is the gradient of the product, so
that Pᵀ·dP = dQ·Qᵀ (= Pᵀ·G·Qᵀ), to rounding, at every step, whatever the data. For neurons between P
and Q that are linear on each side of zero the diagonal of this still holds (Tanaka et al., SynFlow,
arXiv 2006.05467, eq. 4). Of each matrix two such traces are taken, one for its columns and one for
its rows, and partners are those whose traces agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .scratch import ScratchPool

PRODUCTS = ("P·Q", "Q·P", "P·Qᵀ", "Pᵀ·Q")
"""The ways to multiply a parameter P and its partner Q."""

_SHAPE, _LIKENESS = 0.7, 0.3  # how much each counts for compatibility
_WHOLE = 32  # rows or columns up to which the whole trace is taken, and behind it the diagonal
_FARTHEST = 0.02  # from which distance on traces are not of one product, however unlikely chance is
_CHANCE = 0.01  # that any of the others comes as near as is still taken for one
_SAMPLE = 1024  # entries from which the correlation of two matrices is guessed
_CORRELATED = 0.8
_ROWS = 256  # traces that are compared with all others at once
_PIECE = 1 << 20  # elements multiplied at once: 4 MB


@dataclass(frozen=True)
class Relation:
    """A parameter's partner, of its point of view.

    Attributes:
        partner: its index.
        product: how they are multiplied, an index of `PRODUCTS`.
        compatibility: between `compatibility_threshold` and 1.
    """

    partner: int
    product: int
    compatibility: float


def fitting_products(shape: tuple[int, int], other: tuple[int, int]) -> list[int]:
    """Which of `PRODUCTS` the shapes of P and Q allow."""
    (rows, columns), (other_rows, other_columns) = shape, other
    fits = (columns == other_rows, other_columns == rows, columns == other_columns)
    return [k for k, fit in enumerate((*fits, rows == other_rows)) if fit]


def compatibility(products: int, likeness: float) -> float:
    """0.7·(share of the four products that fit) + 0.3·likeness (spec 1 §4)."""
    return _SHAPE * products / len(PRODUCTS) + _LIKENESS * likeness


def discover(
    matrices: Sequence[Tensor],
    gradients: Sequence[Tensor],
    known: Sequence[tuple[int, int]],
    threshold: float,
    pool: ScratchPool,
) -> dict[int, Relation]:
    """The partner of each matrix that has one.

    The likeness of two matrices is how nearly their traces agree, or the correlation of their
    entries over the common length, whichever is larger; chance is no likeness: traces count where
    among all candidates one as near is not to be expected, a correlation from 0.8 on. Matrices
    without any have no partner, however well their shapes fit: in an adapter hundreds of others
    fit as well.

    Args:
        matrices, gradients: `[rows, columns]`, each pair of one shape.
        known: (left, right) of products that names have told; these are partners of likeness 1.
        threshold: the least compatibility.
    """
    best: dict[int, Relation] = {}
    shapes = [(m.shape[0], m.shape[1]) for m in matrices]

    def offer(one: int, other: int, product: int, likeness: float) -> None:
        fitting = len(fitting_products(shapes[one], shapes[other]))
        worth = compatibility(fitting, likeness)
        if worth > threshold and (one not in best or worth > best[one].compatibility):
            best[one] = Relation(other, product, worth)

    for one, other, product, likeness in _alike_traces(matrices, gradients, pool):
        offer(one, other, product, likeness)
    for one, other, likeness in _alike_entries(matrices):
        for product in fitting_products(shapes[one], shapes[other])[:1]:
            offer(one, other, product, likeness)
    for left, right in known:
        best.pop(left, None)
        best.pop(right, None)
        offer(left, right, PRODUCTS.index("P·Q"), 1.0)
        offer(right, left, PRODUCTS.index("Q·P"), 1.0)
    return best


class _Match(NamedTuple):
    one: int
    other: int
    product: int
    likeness: float


class _Traces(NamedTuple):
    """The traces of one length: those of rows, those of columns, and of which matrices they are."""

    rows: list[tuple[int, Tensor]]
    columns: list[tuple[int, Tensor]]


def _alike_traces(
    matrices: Sequence[Tensor], gradients: Sequence[Tensor], pool: ScratchPool
) -> list[_Match]:
    by_length: dict[int, _Traces] = defaultdict(lambda: _Traces([], []))
    for index, (matrix, gradient) in enumerate(zip(matrices, gradients, strict=True)):
        rows, columns = _traces(matrix.float(), gradient.float(), pool)
        by_length[matrix.shape[0]].rows.append((index, rows))
        by_length[matrix.shape[1]].columns.append((index, columns))
    matches: list[_Match] = []
    for length, traces in by_length.items():
        rows, columns = traces
        matches += _compare(columns, rows, length, PRODUCTS.index("P·Q"), turned=False)
        matches += _compare(rows, columns, length, PRODUCTS.index("Q·P"), turned=False)
        matches += _compare(columns, columns, length, PRODUCTS.index("P·Qᵀ"), turned=True)
        matches += _compare(rows, rows, length, PRODUCTS.index("Pᵀ·Q"), turned=True)
    return matches


def _traces(matrix: Tensor, gradient: Tensor, pool: ScratchPool) -> tuple[Tensor, Tensor]:
    """dP·Pᵀ and Pᵀ·dP as float64 vectors; of large ones the diagonals."""
    small_rows, small_columns = (size <= _WHOLE for size in matrix.shape)
    rows = (gradient @ matrix.mT).flatten() if small_rows else matrix.new_empty(len(matrix))
    columns = (matrix.mT @ gradient).flatten() if small_columns else None
    if small_rows and small_columns:
        return rows.double().cpu(), columns.double().cpu()
    along = matrix.new_zeros(matrix.shape[1])
    step = max(1, _PIECE // matrix.shape[1])
    for start in range(0, len(matrix), step):
        piece = slice(start, start + step)
        with pool.take(matrix[piece].shape, matrix.device) as product:
            torch.mul(matrix[piece], gradient[piece], out=product)
            if not small_rows:
                rows[piece] = product.sum(1)
            along += product.sum(0)
    return rows.double().cpu(), (along if columns is None else columns).double().cpu()


def _compare(
    ones: Sequence[tuple[int, Tensor]],
    others: Sequence[tuple[int, Tensor]],
    length: int,
    product: int,
    turned: bool,
) -> list[_Match]:
    """For each one the other with the nearest trace, if that is no chance.

    Args:
        turned: whether traces are compared with transposed ones.
    """
    if not ones or not others:
        return []
    left, right = torch.stack([t for _, t in ones]), torch.stack([t for _, t in others])
    if turned and length <= _WHOLE:
        right = right.view(-1, length, length).mT.flatten(1)
    whose = torch.tensor([index for index, _ in ones])
    candidates = torch.tensor([index for index, _ in others])
    farthest = min(_FARTHEST, 0.5 * (_CHANCE / len(others)) ** (2 / left.shape[1]))
    squares = right.square().sum(1)
    matches = []
    for start in range(0, len(ones), _ROWS):
        piece = left[start : start + _ROWS]
        sizes = piece.square().sum(1, keepdim=True) + squares
        # ‖x − y‖²/(‖x‖² + ‖y‖²), and 1 where both are zero
        distance = 1 - 2 * (piece @ right.mT) / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
        distance[whose[start : start + _ROWS].unsqueeze(1) == candidates] = 1.0
        nearest, where = distance.min(1)
        for row in (nearest <= farthest).nonzero().flatten().tolist():
            one, other = int(whose[start + row]), int(candidates[where[row]])
            matches.append(_Match(one, other, product, 1 - max(float(nearest[row]), 0.0)))
    return matches


def _alike_entries(matrices: Sequence[Tensor]) -> list[tuple[int, int, float]]:
    """Pairs, both ways round, whose entries are correlated over the common length.

    Guessed from the first entries of all, and computed in full where the guess is high.
    """
    flat = [matrix.flatten() for matrix in matrices]
    sizes = torch.tensor([min(len(entries), _SAMPLE) for entries in flat])
    found = []
    for size in sizes.unique().tolist():
        if size < 3:  # two points always lie on a line
            continue
        whose, candidates = ((sizes == size).nonzero(), (sizes >= size).nonzero())
        sample = torch.stack([flat[index][:size].float() for index in candidates.flatten().tolist()])
        sample = sample - sample.mean(1, keepdim=True)
        sample = sample / sample.norm(dim=1, keepdim=True).clamp_min(torch.finfo(sample.dtype).tiny)
        own = sample[sizes[candidates.flatten()] == size]
        for start in range(0, len(own), _ROWS):
            guess = (own[start : start + _ROWS] @ sample.mT).abs()
            for row, column in (guess >= 0.9 * _CORRELATED).nonzero().tolist():
                one, other = int(whose[start + row]), int(candidates[column])
                if one == other or (sizes[other] == size and other < one):
                    continue  # each pair once
                likeness = _correlation(flat[one], flat[other])
                if likeness >= _least_correlation(min(len(flat[one]), len(flat[other])), len(flat)):
                    found += [(one, other, likeness), (other, one, likeness)]
    return found


def _correlation(one: Tensor, other: Tensor) -> float:
    """|correlation| of the entries over the common length."""
    length = min(len(one), len(other))
    x, y = one[:length].double(), other[:length].double()
    x, y = x - x.mean(), y - y.mean()
    norms = x.norm() * y.norm()
    return float((x @ y).abs() / norms) if norms > 0 else 0.0


def _least_correlation(length: int, candidates: int) -> float:
    """The correlation from which on it is neither weak nor chance."""
    chance = (_CHANCE / candidates) ** (2 / max(length - 2, 1))
    return max(_CORRELATED, (1 - chance) ** 0.5)


def product_norms(pairs: Sequence[tuple[Tensor, Tensor, int]]) -> list[float]:
    """‖P·Q‖_F of each (P, Q, index of `PRODUCTS`), from Gram matrices: P·Q is never formed.

    ‖P·Q‖² = ⟨PᵀP, Q·Qᵀ⟩; the other products are that of transposed or exchanged factors.
    """
    norms = []
    for left, right, product in pairs:
        p, q = left.float(), right.float()
        if PRODUCTS[product] == "Q·P":
            p, q = q, p
        elif PRODUCTS[product] == "P·Qᵀ":
            q = q.mT
        elif PRODUCTS[product] == "Pᵀ·Q":
            p = p.mT
        norms.append(float(((p.mT @ p) * (q @ q.mT)).sum().clamp_min(0).sqrt()))
    return norms
