"""Relations: parameters that are multiplied with one another, found in what trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..discovery import PRODUCTS, discover, product_norms
from ..overview import Overview
from ..roles import Roles
from .base import Technique, Work

LEAST, MOST = 0.01, 5.0
"""The limits of the factor on lr of importance and relations together (spec 1 §4)."""

_NORM, _COMPATIBILITY = 0.1, 0.2


class Relations(Technique):
    """Multiplies lr by (1/(1 + 0.1·‖product‖_F))·(1 + 0.2·compatibility) for parameters that have a
    partner; the factors of importance and relations together are held in [0.01, 5].

    Every `interval` steps partners are looked for among all matrices that have a gradient
    (convolutions as out × rest; see `discovery`), and the product's norm is computed. Both stay as
    they are until the next time. Names, where they tell LoRA or LoKr halves, decide first.

    Source: spec 1 §4.

    Args:
        interval: `relationship_discovery_interval`, in steps.
        threshold: `compatibility_threshold`.
    """

    def __init__(self, interval: int, threshold: float) -> None:
        self.interval = interval
        self.threshold = threshold

    def prepare(self, overview: Overview) -> Tensor | None:
        steps = [
            entry.get("step", 0) + 1
            for entry, param in zip(overview.entries, overview.params, strict=True)
            if param.grad is not None
        ]
        if max(steps, default=1) % self.interval == 0:
            self._discover(overview)
        return torch.tensor([_scale(entry) for entry in overview.entries], dtype=torch.float64)

    def apply(self, work: Work) -> None:
        work.pace = (work.pace * work.factors[self]).clamp(LEAST, MOST)

    def _discover(self, overview: Overview) -> None:
        """Look for partners anew, among those that have a gradient and a state to note them in."""
        chosen = [
            index
            for index, (param, entry) in enumerate(
                zip(overview.params, overview.entries, strict=True)
            )
            if param.grad is not None and entry and param.ndim >= 2 and param.numel()
        ]
        params = [overview.params[index] for index in chosen]
        grads = [param.grad for param in params if param.grad is not None]
        matrices = [param.detach().flatten(1) for param in params]
        place = {param: k for k, param in enumerate(params)}
        known = [(place[a], place[b]) for a, b in _named(overview.roles) if {a, b} <= place.keys()]
        gradients = [grad.flatten(1) for grad in grads]
        relations = discover(matrices, gradients, known, self.threshold, overview.scratch)
        norms = product_norms(matrices, relations)
        bearers = Counter(overview.names)
        for index in chosen:
            overview.entries[index].pop("relation", None)
        for k, relation in relations.items():
            partner = chosen[relation.partner]
            name = overview.names[partner]
            overview.entries[chosen[k]]["relation"] = {
                # A name is still right where parameters are grouped otherwise.
                "partner": name if name and bearers[name] == 1 else partner,
                "product": PRODUCTS[relation.product],
                "compatibility": relation.compatibility,
                "product_norm": norms[k],
            }


def _named(roles: Roles) -> list[tuple[Tensor, Tensor]]:
    """The left and the right factor of products, as names tell them."""
    pairs = [(pair.b, pair.a) for pair in roles.lora_pairs if pair.mid is None]
    for pair in roles.lokr_pairs:
        for factor in (pair.w1, pair.w2):
            if factor.a is not None and factor.b is not None and factor.core is None:
                pairs.append((factor.a, factor.b))
    return pairs


def _scale(entry: Mapping[str, Any]) -> float:
    relation = entry.get("relation")
    if relation is None:
        return 1.0
    scale = (1 + _COMPATIBILITY * relation["compatibility"]) / (
        1 + _NORM * relation["product_norm"]
    )
    return float(scale)
