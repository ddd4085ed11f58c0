"""Pair scaling: the learning rate of an adapter's halves by the size of their product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..layout import square_sums
from ..roles import Factor, LoKrPair, LoRAPair, Roles
from .base import Technique, Work

_LOKR_NORM = 0.3
_LOKR_RATIO = 0.6


class PairScale(Technique):
    """Scales lr of the tensors of each pair; tensors without a partner keep theirs.

    LoRA: both halves by 1/(1 + mean row norm of B·A), B also by `ratio`.
    LoKr: every `lokr_*` by 1/(1 + 0.3·‖w1‖·‖w2‖), where ‖w1‖·‖w2‖ = ‖w1 ⊗ w2‖ exactly, and the half
    that starts at zero (w2, or w2_b where w2 is factored) also by 0.6·`ratio`.

    Source: spec 1 §3, after Huang and Balestriero, ALLoRA, arXiv 2410.09692, and Hayou et al.,
    LoRA+, arXiv 2402.12354.

    Args:
        ratio: the `alora_ratio` of the optimizer.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def prepare(self, roles: Roles) -> Mapping[Tensor, Tensor]:
        factors: dict[Tensor, Tensor] = {}
        if roles.lora_pairs:
            scale = 1 / (1 + lora_row_norms(roles.lora_pairs))
            halves = zip(
                roles.lora_pairs, scale.unbind(), (scale * self.ratio).unbind(), strict=True
            )
            for lora, for_a, for_b in halves:
                factors[lora.a] = for_a
                factors[lora.b] = for_b
        if roles.lokr_pairs:
            scale = 1 / (1 + _LOKR_NORM * lokr_norms(roles.lokr_pairs))
            of_zero = scale * (_LOKR_RATIO * self.ratio)
            for lokr, all_of_it, zero in zip(
                roles.lokr_pairs, scale.unbind(), of_zero.unbind(), strict=True
            ):
                factors.update(dict.fromkeys(lokr.members, all_of_it))
                factors[lokr.w2.zero_initialised] = zero
        return factors

    def apply(self, work: Work) -> None:
        factors = work.prepared[self]
        one = torch.ones((), device=work.p.device)
        scale = torch.stack([factors.get(p, one).to(one.device) for p in work.params])
        work.pace = work.pace * scale


def _same_shapes(items: Sequence[tuple[Tensor | None, ...]]) -> list[list[int]]:
    """Indices of items whose tensors agree in shape, dtype and device: these can be stacked."""
    batches: dict[tuple, list[int]] = defaultdict(list)
    for index, tensors in enumerate(items):
        key = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors)
        batches[key].append(index)
    return list(batches.values())


def _stack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([t.to(device) for t in tensors]).float()


def lora_row_norms(pairs: Sequence[LoRAPair]) -> Tensor:
    """Mean row norm of B·A of each pair, `[pairs]` float32.

    Row i of B·A is bᵢA, and ‖bᵢA‖² = bᵢ(AAᵀ)bᵢᵀ: the r×r Gram matrix of A is enough, B·A is never
    formed. A is `[r, in]` (a convolution `[r, in·kernel]`), B `[out, r]`. With a Tucker core M
    (`[r, r, kernel]`) A stands for all matrices MₖA, whose Gram matrix is Σₖ Mₖ(AAᵀ)Mₖᵀ.
    """
    home = pairs[0].a.device
    norms: dict[int, Tensor] = {}
    for batch in _same_shapes([(pair.a, pair.b, pair.mid) for pair in pairs]):
        some = [pairs[i] for i in batch]
        a = _stack([pair.a for pair in some], home).flatten(2)
        b = _stack([pair.b for pair in some], home).flatten(2)
        gram = a @ a.mT
        mids = [pair.mid for pair in some if pair.mid is not None]
        if mids:
            mid = _stack(mids, home).flatten(3).movedim(3, 1)
            gram = (mid @ gram.unsqueeze(1) @ mid.mT).sum(1)
        squares = ((b @ gram) * b).sum(2).clamp_min(0)
        norms.update(zip(batch, squares.sqrt().mean(1).unbind(), strict=True))
    return torch.stack([norms[i] for i in range(len(pairs))])


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
        norms.update(zip(wholes, square_sums(list(wholes.values())).unbind(), strict=True))
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
