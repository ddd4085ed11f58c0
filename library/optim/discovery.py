"""Which matrices are multiplied with one another, found without names.

If a model uses P and Q only as the product P·Q, it does not change when P becomes P·M and Q becomes
M⁻¹·Q. The gradients know of it: dP = G·Qᵀ and dQ = Pᵀ·G, where G is the gradient of the product, so
that Pᵀ·dP = dQ·Qᵀ (= Pᵀ·G·Qᵀ), to rounding, at every step, whatever the data. For neurons between P
and Q that are linear on each side of zero, or dropped at random, the diagonal of this still holds
(Tanaka et al., SynFlow, arXiv 2006.05467, eq. 4). A bias between them is part of the symmetry and
is not looked at: with one the two sides differ. Of each matrix two such traces are taken, one for
its columns and one for its rows, and partners are those whose traces agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .scratch import ScratchPool

PRODUCTS = ("P·Q", "Q·P", "P·Qᵀ", "Pᵀ·Q")
"""The ways to multiply a parameter P and its partner Q."""

_SHAPE, _LIKENESS = 0.7, 0.3  # how much each counts for compatibility
_WHOLE = 32  # rows or columns up to which the whole trace is taken, too, and not its diagonal alone
# Beyond this distance traces are not of one product, however unlikely chance is: products computed
# in bfloat16 stay below 1e-4, what modules that learn much the same have in common above 3e-3.
_FARTHEST = 5e-4
_FEW = 64  # entries of a trace
_CHANCE = 0.01  # that any of the others comes as near as is still taken for one
_SAMPLE = 512  # entries from which the correlation of two matrices is guessed
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

    Partners are who names say so; among the rest, those whose traces agree, whole ones (of up to 32
    rows or columns) before diagonals; among the rest of these, those whose entries are correlated
    over the common length. How nearly two agree is their likeness, and chance is none: traces
    count where one as near is not to be expected among all candidates, a correlation from 0.8 on.
    Of several the most alike is the partner, not the one of which more products fit, and matrices
    without any likeness are no partners: in an adapter hundreds of others fit as well.

    Args:
        matrices, gradients: `[rows, columns]`, each pair of one shape.
        known: (left, right) of products that names have told; these are partners of likeness 1.
        threshold: the least compatibility.
        pool: scratch memory.
    """
    shapes = [(m.shape[0], m.shape[1]) for m in matrices]
    related: dict[int, Relation] = {}

    def take(matches: Iterable[_Match]) -> None:
        """Of several partners the most alike one."""
        nearest: dict[int, float] = {}
        for one, other, product, likeness in matches:
            fitting = len(fitting_products(shapes[one], shapes[other]))
            worth = compatibility(fitting, likeness)
            if worth > threshold and likeness > nearest.get(one, 0.0):
                nearest[one] = likeness
                related[one] = Relation(other, product, worth)

    def rest() -> list[int]:
        return [index for index in range(len(matrices)) if index not in related]

    for left, right in known:
        take([_Match(left, right, PRODUCTS.index("P·Q"), 1.0)])
        take([_Match(right, left, PRODUCTS.index("Q·P"), 1.0)])
    take(_alike_traces({k: _whole_traces(matrices[k], gradients[k]) for k in rest()}))
    take(_alike_traces({k: _diagonals(matrices[k], gradients[k], pool) for k in rest()}))
    take(_alike_entries({k: matrices[k] for k in rest()}))
    return related


class _Match(NamedTuple):
    one: int
    other: int
    product: int
    likeness: float


class _Traces(NamedTuple):
    """dP·Pᵀ for the rows and Pᵀ·dP for the columns, as vectors on the processor; None for one that
    is not taken."""

    rows: Tensor | None
    columns: Tensor | None


def _whole_traces(matrix: Tensor, gradient: Tensor) -> _Traces:
    """The traces of few rows or few columns."""
    few_rows, few_columns = (size <= _WHOLE for size in matrix.shape)
    if not few_rows and not few_columns:
        return _Traces(None, None)
    p, g = matrix.float(), gradient.float()
    return _Traces(
        (g @ p.mT).cpu() if few_rows else None, (p.mT @ g).cpu() if few_columns else None
    )


def _diagonals(matrix: Tensor, gradient: Tensor, pool: ScratchPool) -> _Traces:
    """The diagonals of the traces; none of a single number, which is the whole trace."""
    rows = matrix.new_empty(matrix.shape[0], dtype=torch.float32)
    columns = matrix.new_zeros(matrix.shape[1], dtype=torch.float32)
    step = max(1, _PIECE // matrix.shape[1])
    for start in range(0, len(matrix), step):
        p, g = matrix[start : start + step].float(), gradient[start : start + step].float()
        with pool.take(p.shape, p.device) as product:
            torch.mul(p, g, out=product)
            torch.sum(product, 1, out=rows[start : start + step])
            columns += product.sum(0)
    return _Traces(
        rows.cpu() if len(rows) > 1 else None, columns.cpu() if len(columns) > 1 else None
    )


def _alike_traces(traces: Mapping[int, _Traces]) -> Iterator[_Match]:
    """The nearest trace for each side of each matrix, if that is no chance."""
    sides: dict[int, tuple[dict[int, Tensor], dict[int, Tensor]]] = defaultdict(lambda: ({}, {}))
    for index, (rows, columns) in traces.items():
        if rows is not None:
            sides[len(rows)][0][index] = rows
        if columns is not None:
            sides[len(columns)][1][index] = columns
    for rows_of, columns_of in sides.values():
        yield from _compare(columns_of, rows_of, ("P·Q", "Q·P"))
        yield from _compare(columns_of, columns_of, ("P·Qᵀ",))
        yield from _compare(rows_of, rows_of, ("Pᵀ·Q",))


def _compare(
    ones: Mapping[int, Tensor], others: Mapping[int, Tensor], products: tuple[str, ...]
) -> Iterator[_Match]:
    """For each one the other with the nearest trace, if that is no chance.

    Args:
        products: what one and other are then, and if it is not the same for the other, what other
            and one are. Traces of the same side are each other's transposes.
    """
    if not ones or not others:
        return
    left = torch.stack(list(ones.values()))
    right = left if ones is others else torch.stack(list(others.values()))
    if len(products) == 1 and right.ndim == 3:
        right = right.mT
    left, right = left.flatten(1), right.flatten(1)
    length = left.shape[1]
    if length <= _FEW:  # where chance comes near, float32 would not tell
        left, right = left.double(), right.double()
    farthest = min(_FARTHEST, 0.5 * (_CHANCE / max(len(ones), len(others))) ** (2 / length))
    whose, candidates = torch.tensor(list(ones)), torch.tensor(list(others))
    nearest_of_others = torch.full((len(right),), 2.0, dtype=left.dtype)
    its_one = torch.zeros(len(right), dtype=torch.int64)
    squares = right.square().sum(1)
    for start in range(0, len(left), _ROWS):
        piece, own = left[start : start + _ROWS], whose[start : start + _ROWS]
        sizes = piece.square().sum(1, keepdim=True) + squares
        sizes.clamp_min_(torch.finfo(sizes.dtype).tiny)
        # ‖x − y‖²/(‖x‖² + ‖y‖²), and 1 where both are zero
        distance = (piece @ right.mT).mul_(-2).div_(sizes).add_(1)
        distance[own.unsqueeze(1) == candidates] = 1.0
        yield from _near(own, candidates, *distance.min(1), farthest, products[0])
        least, row = distance.min(0)
        nearer = least < nearest_of_others
        nearest_of_others = torch.where(nearer, least, nearest_of_others)
        its_one = torch.where(nearer, start + row, its_one)
    if len(products) > 1:
        yield from _near(candidates, whose, nearest_of_others, its_one, farthest, products[1])


def _near(
    ones: Tensor, others: Tensor, distance: Tensor, where: Tensor, farthest: float, product: str
) -> Iterator[_Match]:
    """Of nearest others those that are near."""
    for row in (distance <= farthest).nonzero().flatten().tolist():
        likeness = 1 - max(float(distance[row]), 0.0)
        other = int(others[where[row]])
        yield _Match(int(ones[row]), other, PRODUCTS.index(product), likeness)


def _alike_entries(matrices: Mapping[int, Tensor]) -> Iterator[_Match]:
    """Pairs, both ways round, whose shapes fit and whose entries are correlated.

    Guessed from the first entries of all, and computed in full where the guess is high.
    """
    flat = {index: matrix.flatten() for index, matrix in matrices.items()}
    lengths = sorted({min(len(entries), _SAMPLE) for entries in flat.values()} - {0, 1, 2})
    for length in lengths:  # of the shorter one of a pair, or both are longer than the sample
        longer = [index for index, entries in flat.items() if len(entries) >= length]
        shorter = [index for index in longer if min(len(flat[index]), _SAMPLE) == length]
        sample = torch.stack([flat[index][:length].float().cpu() for index in longer])
        sample -= sample.mean(1, keepdim=True)
        sample /= sample.norm(dim=1, keepdim=True).clamp_min(torch.finfo(sample.dtype).tiny)
        place = {index: row for row, index in enumerate(longer)}
        own_place = {index: place[index] for index in shorter}
        own = sample[list(own_place.values())]
        for start in range(0, len(own), _ROWS):
            guess = (own[start : start + _ROWS] @ sample.mT).abs()
            for row, column in (guess >= 0.9 * _CORRELATED).nonzero().tolist():
                one, other = shorter[start + row], longer[column]
                if one < other or other not in own_place:  # a pair of one length once
                    yield from _correlated(one, other, matrices, len(flat))


def _correlated(
    one: int, other: int, matrices: Mapping[int, Tensor], candidates: int
) -> Iterator[_Match]:
    """The match of two matrices, and the other way round, if their entries are correlated."""
    p, q = matrices[one], matrices[other]
    products = fitting_products((p.shape[0], p.shape[1]), (q.shape[0], q.shape[1]))
    likeness = _correlation(p.flatten(), q.flatten())
    chance = (_CHANCE / candidates) ** (2 / max(min(p.numel(), q.numel()) - 2, 1))
    if products and likeness >= max(_CORRELATED, (1 - chance) ** 0.5):
        turned = (1, 0, 2, 3)[products[0]]
        yield _Match(one, other, products[0], likeness)
        yield _Match(other, one, turned, likeness)


def _correlation(one: Tensor, other: Tensor) -> float:
    """|correlation| of the entries over the common length."""
    length = min(len(one), len(other))
    x, y = one[:length].double(), other[:length].to(one.device).double()
    sizes = x.norm() * y.norm()
    x, y = x - x.mean(), y - y.mean()
    spreads = x.norm() * y.norm()
    # What rounding leaves of entries that are all the same is no spread.
    return float((x @ y).abs() / spreads) if spreads > 1e-12 * sizes else 0.0


def product_norms(
    matrices: Sequence[Tensor], relations: Mapping[int, Relation]
) -> dict[int, float]:
    """‖P·Q‖_F of each matrix P with its partner Q, from Gram matrices: P·Q is never formed.

    ‖P·Q‖² = ⟨PᵀP, Q·Qᵀ⟩; the other products are that of transposed or exchanged factors.
    """
    norms: dict[tuple[int, int, bool, bool], float] = {}
    found = {}
    for index, relation in relations.items():
        left, right = index, relation.partner
        product = PRODUCTS[relation.product]
        if product == "Q·P" or (product != "P·Q" and left > right):
            left, right = right, left  # the same product is computed once
        first, second = product == "Pᵀ·Q", product == "P·Qᵀ"
        case = (left, right, first, second)
        if case not in norms:
            p, q = matrices[left].float(), matrices[right].float()
            norms[case] = _product_norm(p.mT if first else p, q.mT if second else q)
        found[index] = norms[case]
    return found


def _product_norm(p: Tensor, q: Tensor) -> float:
    """‖P·Q‖_F, from some rows at a time of the two Gram matrices."""
    total = 0.0
    step = max(1, _PIECE // len(q))
    for start in range(0, len(q), step):
        piece = slice(start, start + step)
        gram = (q[piece] @ q.mT).to(p.device)
        total += float(((p[:, piece].mT @ p) * gram).sum())
    return max(total, 0.0) ** 0.5
