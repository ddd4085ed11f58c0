"""How the server makes one adapter of the clients' adapters.

A pair is `…lora_A.weight` [r, in] and `…lora_B.weight` [out, r]; what acts is B·A. Every other
tensor (a head trained whole, biases) is averaged. An update is a client's weight, its number of
pictures, and its tensors by name. All sums are made in float64, results are of the tensors' dtype,
and the order of updates matters to nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Tensors = Mapping[str, Array]
Update = tuple[float, Tensors]
Factors = tuple[float, Array, Array]  # a client's share, B and A
A, B = "lora_A.weight", "lora_B.weight"


def fedavg(updates: Sequence[Update]) -> dict[str, Array]:
    """The weighted mean of each tensor.

    Cheap and usual, but not the mean of what the clients' adapters do: mean(B)·mean(A) holds the
    product of each client's B with each other's A, which nobody has trained. `product_error` says
    how far off that is.

    Source: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
    Data, arXiv 1602.05629, algorithm 1.

    Raises:
        ValueError: no updates, a weight that is not positive and finite, or tensors that differ
            in name or shape.
    """
    shares = _shares(updates)
    return {name: _mean(shares, updates, name) for name in updates[0][1]}


def product(updates: Sequence[Update]) -> dict[str, Array]:
    """The weighted mean of the clients' B·A, factored again at the rank r of the pair.

    Exact where that mean has rank r or less, else the nearest matrix of rank r (Eckart and Young,
    1936). Of the equivalent factors those are taken with which training goes on as before: A has
    orthogonal rows, each as long as the clients' are in the weighted root mean square, turned to
    lie nearest to the mean of A; B holds the rest. So B's gradients keep their usual size, also
    where the mean of the products is zero. Half a pair (A that does not travel) is averaged.

    Source: Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
    and Client Resources, arXiv 2402.11505, for averaging products; the choice of factors is ours.

    Raises:
        ValueError: as `fedavg`, or a pair that is not [out, r] and [r, in].
    """
    combined = fedavg(updates)
    for b, a in _pairs(combined):
        left, right = _refactored(_factors(updates, b, a))
        combined[b] = left.astype(combined[b].dtype)
        combined[a] = right.astype(combined[a].dtype)
    return combined


def frozen_a(updates: Sequence[Update]) -> dict[str, Array]:
    """The weighted mean, of clients whose A is one and the same: the mean of B·A exactly.

    Usually A does not travel then.

    Source: Sun et al., Improving LoRA in Privacy-preserving Federated Learning, arXiv 2403.12313.

    Raises:
        ValueError: as `fedavg`, or an A that is not the same in all updates.
    """
    combined = fedavg(updates)
    first = updates[0][1]
    for name in first:
        if name.endswith(A):
            if not all(np.array_equal(one[name], first[name]) for _, one in updates):
                raise ValueError(f"'{name}' differs between clients; with frozen_a it is one A.")
            combined[name] = first[name].copy()  # a mean of equals may be off by a rounding
    return combined


AGGREGATIONS: dict[str, Callable[[Sequence[Update]], dict[str, Array]]] = {
    "fedavg": fedavg,
    "product": product,
    "frozen_a": frozen_a,
}


def product_error(updates: Sequence[Update], combined: Tensors) -> float:
    """How far the combined B·A are from the weighted means of the clients' B·A.

    Returns:
        The Frobenius norm of the difference over that of the means, all pairs together: 0 where
        both are zero or there are no pairs, infinity where only the means are zero.

    Raises:
        ValueError: as `product`, or combined tensors that are not shaped like the updates'.
    """
    _shares([*updates, (1.0, combined)])
    apart, size = [0.0], [0.0]
    for b, a in _pairs(combined):
        factors = _factors(updates, b, a)
        size.append(_norm_of_sum(factors))
        apart.append(_norm_of_sum([*factors, (-1.0, _wide(combined[b]), _wide(combined[a]))]))
    difference, whole = math.hypot(*apart), math.hypot(*size)
    if whole == 0:
        return math.inf if difference else 0.0
    return difference / whole


def _refactored(factors: Sequence[Factors]) -> tuple[Array, Array]:
    """B [out, r] and A [r, in] for the sum of share·B·A, without making it. See `product`."""
    rank = factors[0][2].shape[0]
    mean = np.sum([share * a for share, _, a in factors], axis=0)
    length = math.sqrt(sum(share * np.square(a).sum() / rank for share, _, a in factors))
    if length == 0:  # no A gives a direction: all products are zero, and so is mean(B)·0
        return np.sum([share * b for share, b, _ in factors], axis=0), mean
    left, right = _stacked(factors)
    of_left, left_core = np.linalg.qr(left)
    of_right, right_core = np.linalg.qr(right.T)
    u, values, vt = np.linalg.svd(left_core @ right_core.T)
    # A value in the rounding of the stacks is a zero, and its vector is noise.
    noise = np.finfo(np.float64).eps * (len(left) + right.shape[1]) * np.square(left).sum()
    kept = min(rank, int((values > noise).sum()))
    scaled, vectors = of_left @ (u[:, :kept] * values[:kept]), vt[:kept] @ of_right.T

    rows = _completed(vectors, rank, factors)
    # Orthogonal Procrustes (Schönemann, 1966). The small diagonal settles what the mean leaves
    # open, in favour of the order and the signs that the rows have.
    towards = mean @ rows.T + 1e-9 * length * np.eye(rank, len(rows))
    turn_u, _, turn_vt = np.linalg.svd(towards, full_matrices=False)
    length *= math.sqrt(rank / len(rows))  # 1, but where `in` has no room for r orthogonal rows
    down = length * (turn_u @ turn_vt) @ rows
    return scaled @ (vectors @ down.T) / length**2, down


def _completed(vectors: Array, rank: int, factors: Sequence[Factors]) -> Array:
    """Orthonormal rows, r of them or `in` where that is less: these and, where they are fewer, the
    directions in which the clients' A reach farthest beside them. Signs: the largest element of
    each row is positive."""
    if len(vectors) < rank:
        reach = np.concatenate([math.sqrt(share) * a for share, _, a in factors])
        reach -= reach @ vectors.T @ vectors
        # The given ones enter longer than all else, so they stay among the first and the rest is
        # orthogonal to them even where it is zero.
        longest = 2 * float(np.linalg.norm(reach)) or 1.0
        _, _, vt = np.linalg.svd(np.concatenate([longest * vectors, reach]), full_matrices=False)
        vectors = vt[:rank]
    largest = np.abs(vectors).argmax(axis=1)
    return vectors * np.sign(vectors[np.arange(len(vectors)), largest])[:, None]


def _norm_of_sum(factors: Sequence[Factors]) -> float:
    """The Frobenius norm of the sum of share·B·A, from R of QR: differences keep their digits,
    which the traces of squares would lose."""
    left, right = _stacked(factors)
    left_core, right_core = (np.asarray(np.linalg.qr(m, mode="r")) for m in (left, right.T))
    return float(np.linalg.norm(left_core @ right_core.T))


def _stacked(factors: Sequence[Factors]) -> tuple[Array, Array]:
    """[out, K·r] and [K·r, in] whose product is the sum of share·B·A. The halves of a pair are made
    equally long, so that one client's large A does not drown in rounding another's large B."""
    lefts, rights = [], []
    for share, b, a in factors:
        b_norm, a_norm = float(np.linalg.norm(b)), float(np.linalg.norm(a))
        half = math.sqrt(abs(share) * b_norm * a_norm)
        lefts.append(math.copysign(half, share) / (b_norm or 1.0) * b)
        rights.append(half / (a_norm or 1.0) * a)
    return np.concatenate(lefts, axis=1), np.concatenate(rights)


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of B and A of each whole pair."""
    present = list(names)
    both = [(name, name.removesuffix(B) + A) for name in present if name.endswith(B)]
    return [(b, a) for b, a in both if a in present]


def _factors(updates: Sequence[Update], b: str, a: str) -> list[Factors]:
    """Shares, B and A of one pair.

    Raises:
        ValueError: these are not [out, r] and [r, in].
    """
    left, right = updates[0][1][b].shape, updates[0][1][a].shape
    if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
        raise ValueError(f"'{b}' {left} and '{a}' {right} are not [out, r] and [r, in].")
    shares = _shares(updates)
    return [(s, _wide(one[b]), _wide(one[a])) for s, (_, one) in zip(shares, updates, strict=True)]


def _shares(updates: Sequence[Update]) -> list[float]:
    """The clients' weights, divided by their sum.

    Raises:
        ValueError: as `fedavg`.
    """
    if not updates:
        raise ValueError("There are no updates to average.")
    first = updates[0][1]
    for weight, one in updates:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"A client's weight is {weight}; it has to be positive and finite.")
        if unlike := sorted(first.keys() ^ one.keys()):
            raise ValueError(f"'{unlike[0]}' is in some updates only.")
        for name, array in one.items():
            if array.shape != first[name].shape:
                raise ValueError(f"'{name}' is {array.shape} here and {first[name].shape} there.")
            if array.dtype.kind != "f":
                raise ValueError(f"'{name}' holds {array.dtype}, not floating-point numbers.")
    whole = math.fsum(weight for weight, _ in updates)
    return [weight / whole for weight, _ in updates]


def _mean(shares: Sequence[float], updates: Sequence[Update], name: str) -> Array:
    arrays = [one[name] for _, one in updates]
    mean = sum(s * _wide(array) for s, array in zip(shares, arrays, strict=True))
    return np.asarray(mean, dtype=np.result_type(*arrays))


def _wide(array: Array) -> Array:
    return array.astype(np.float64)
