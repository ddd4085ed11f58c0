"""In which order tensors are worked on, so that the halves of a LoRA pair meet in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..roles import LoRAPair


@dataclass(frozen=True)
class Order:
    """An order of tensors.

    Attributes:
        tensors: int64 `[active]`, a permutation; the halves of a pair are neighbours.
        ranks: int64 `[active]`, of the pair whose first half stands here, negative if that is B;
            0 for all others.
        pairs: the indices of the pairs whose halves are both among the tensors.
    """

    tensors: Tensor
    ranks: Tensor
    pairs: frozenset[int]


def order_of(params: Sequence[Tensor], pairs: Sequence[LoRAPair]) -> Order:
    """From the last tensor to the first: the look at gradients ended with the last ones, and these
    still lie in the processor's shared cache."""
    place = {param: k for k, param in enumerate(params)}
    # A Tucker core between the halves has no machine code.
    both = [k for k, p in enumerate(pairs) if p.mid is None and p.a in place and p.b in place]
    partner: dict[int, tuple[int, int]] = {}
    for pair in map(pairs.__getitem__, both):
        a, b, rank = place[pair.a], place[pair.b], pair.a.shape[0]
        partner[a], partner[b] = (b, rank), (a, -rank)
    tensors, ranks = [], []
    taken = set()
    for k in reversed(range(len(params))):
        if k in taken:
            continue
        tensors.append(k)
        if k in partner:
            other, rank = partner[k]
            tensors.append(other)
            taken.add(other)
            ranks += [rank, 0]
        else:
            ranks.append(0)
    return Order(torch.tensor(tensors), torch.tensor(ranks), frozenset(both))
