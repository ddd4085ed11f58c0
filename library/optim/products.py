"""Norms of products of matrices that are never formed: batched by shape, one stack of factors at a
time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .roles import Factor, LoKrPair, LoRAPair


def _shapes(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What tensors must agree in to be stacked with others."""
    return tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors)


def _same_shapes(items: Sequence[tuple[Tensor | None, ...]]) -> list[list[int]]:
    """Indices of items whose tensors can be stacked."""
    batches: dict[Any, list[int]] = defaultdict(list)
    for index, tensors in enumerate(items):
        batches[_shapes(tensors)].append(index)
    return list(batches.values())


def _stack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([t.to(device) for t in tensors]).float()


def lora_row_norms(pairs: Sequence[LoRAPair]) -> Tensor:
    """Mean row norm of B·A of each pair, `[pairs]` float64.

    Row i of B·A is bᵢA, and ‖bᵢA‖² = bᵢ(AAᵀ)bᵢᵀ: the r×r Gram matrix of A is enough, B·A is never
    formed. A is `[r, in]` (a convolution `[r, in·kernel]`), B `[out, r]`. With a Tucker core M
    (`[r, r, kernel]`) A stands for all matrices MₖA, whose Gram matrix is Σₖ Mₖ(AAᵀ)Mₖᵀ.
    """
    home = pairs[0].a.device
    norms = torch.empty(len(pairs), dtype=torch.float64, device=home)
    for batch in _same_shapes([(pair.a, pair.b, pair.mid) for pair in pairs]):
        norms[batch] = _row_norms([pairs[i] for i in batch], home).double()
    return norms


def _row_norms(pairs: Sequence[LoRAPair], home: torch.device) -> Tensor:
    """Mean row norms of pairs of one shape."""
    a = _stack([pair.a for pair in pairs], home).flatten(2)
    b = _stack([pair.b for pair in pairs], home).flatten(2)
    gram = a @ a.mT
    mids = [pair.mid for pair in pairs if pair.mid is not None]
    if mids:
        mid = _stack(mids, home).flatten(3).movedim(3, 1)
        gram = (mid @ gram.unsqueeze(1) @ mid.mT).sum(1)
    return ((b @ gram) * b).sum(2).clamp_min(0).sqrt().mean(1)


def lokr_norms(pairs: Sequence[LoKrPair]) -> Tensor:
    """‖w1‖_F·‖w2‖_F = ‖w1 ⊗ w2‖_F of each pair, `[pairs]` float32."""
    home = pairs[0].members[0].device
    w1 = _square_norms([pair.w1 for pair in pairs], home)
    w2 = _square_norms([pair.w2 for pair in pairs], home)
    return w1.sqrt() * w2.sqrt()


def _square_norms(factors: Sequence[Factor], home: torch.device) -> Tensor:
    """‖w‖²_F of each factor, without forming those that are products.

    a·b (`[m, r]`, `[r, n]`): ⟨aᵀa, bbᵀ⟩. Tucker, w = Σᵢⱼ Tᵢⱼₖ·aᵢ ⊗ bⱼ with a `[r, m]`, b `[r, n]`:
    Σₖ ⟨(aaᵀ)Tₖ(bbᵀ), Tₖ⟩.
    """
    norms: dict[int, Tensor] = {}
    wholes = {i: f.whole.to(home) for i, f in enumerate(factors) if f.whole is not None}
    if wholes:
        norms.update(
            zip(
                wholes,
                torch.stack(torch._foreach_norm(list(wholes.values()))).float().square().unbind(),
                strict=True,
            )
        )
    products = {i: (f.a, f.b, f.core) for i, f in enumerate(factors) if f.whole is None}
    for batch in _same_shapes(list(products.values())):
        indices = [list(products)[i] for i in batch]
        parts = zip(*(products[i] for i in indices), strict=True)
        a, b, core = ([part for part in column if part is not None] for column in parts)
        squares = _product_square_norms(_stack(a, home), _stack(b, home), core, home)
        norms.update(zip(indices, squares.unbind(), strict=True))
    return torch.stack([norms[i] for i in range(len(factors))])


def _product_square_norms(
    a: Tensor, b: Tensor, cores: Sequence[Tensor], home: torch.device
) -> Tensor:
    """‖a·b‖²_F, or that of the Tucker product with `cores`, of stacked factors: `[stack]`."""
    b = b.flatten(2)
    if not cores:
        return ((a.mT @ a) * (b @ b.mT)).sum((1, 2)).clamp_min(0)
    core = _stack(cores, home).flatten(3).movedim(3, 1)
    left, right = (a @ a.mT).unsqueeze(1), (b @ b.mT).unsqueeze(1)
    return ((left @ core @ right) * core).sum((1, 2, 3)).clamp_min(0)
