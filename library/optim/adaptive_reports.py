"""What AdaptiveHinaAdamW tells of a run (spec 1 §4). The keys are the same at every moment: before
anything is known there are zeros, and the reports' `message` says so; later it is empty."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .overview import Overview
from .techniques.importance import importances

if TYPE_CHECKING:
    from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW

Report = dict[str, Any]

_NO_STEP = "No step has been taken yet."
_EDGES = [10.0 ** (k / 40) for k in range(-120, 41)]
"""Of the bins that factors of lr_mask are counted in, from their least to their highest."""


def optimization_info(optimizer: AdaptiveHinaAdamW) -> Report:
    """Settings, and where training stands."""
    settings, overview = optimizer.settings, optimizer.overview()
    steps = [entry.get("step", 0) for entry in overview.entries]
    importance = importance_analysis(optimizer)
    mask = lr_mask_analysis(optimizer)
    return {
        "optimizer_type": type(optimizer).__name__,
        "version": optimizer.VERSION,
        "total_params": len(steps),
        "features": optimizer.features,
        "adaptation_config": {
            key: settings[key]
            for key in (
                "adaptation_strength",
                "relationship_discovery_interval",
                "importance_decay",
                "compatibility_threshold",
            )
        },
        "lr_mask_config": mask["configuration"],
        "training_stats": {
            "global_step": max(steps, default=0),
            "total_relationships": relationship_summary(optimizer)["total_relationships"],
            "avg_importance_score": importance["importance_statistics"]["mean"],
            "lr_mask_stats": mask["global_statistics"],
        },
        "message": "" if any(steps) else _NO_STEP,
    }


def relationship_summary(optimizer: AdaptiveHinaAdamW) -> Report:
    """The parameters that have a partner; `joint_importance` is the mean of both importances."""
    overview = optimizer.overview()
    importance = importances(overview)
    relationships = [
        {
            "param_name": overview.names[index],
            "partner_name": overview.names[partner],
            "param_index": index,
            "partner_index": partner,
            "param_shape": tuple(overview.params[index].shape),
            "partner_shape": tuple(overview.params[partner].shape),
            "compatibility": relation["compatibility"],
            "joint_importance": float(importance[[index, partner]].mean()),
            "interaction_type": relation["product"],
            "product_norm": relation["product_norm"],
        }
        for index, partner, relation in _relations(overview)
    ]
    message = ""
    if not optimizer.switches["use_dynamic_adaptation"]:
        message = "Relations are not looked for (use_dynamic_adaptation=False)."
    elif not relationships:
        interval = optimizer.settings["relationship_discovery_interval"]
        message = f"No partners found yet: they are looked for every {interval} steps."
    return {
        "total_relationships": len(relationships),
        "relationships": relationships,
        "message": message,
    }


def _relations(overview: Overview) -> Iterator[tuple[int, int, Report]]:
    """A parameter, its partner, and what was noted of both, for each parameter that has one."""
    place = {name: index for index, name in enumerate(overview.names) if name}
    for index, entry in enumerate(overview.entries):
        if "relation" not in entry:
            continue
        relation = entry["relation"]
        partner = place.get(relation["partner"], relation["partner"])
        # A number, unless it is a partner that is no longer trained.
        if isinstance(partner, int) and partner < len(overview.params):
            yield index, partner, relation


def importance_analysis(optimizer: AdaptiveHinaAdamW) -> Report:
    """How importance is distributed over the parameters that have taken a step."""
    overview = optimizer.overview()
    on = optimizer.switches["use_dynamic_adaptation"]
    known = importances(overview)[overview.begun] if on else torch.zeros(0, dtype=torch.float64)
    statistics = dict.fromkeys(("mean", "max", "min", "std"), 0.0)
    if len(known):
        std = known.std(correction=0)
        found = (known.mean(), known.max(), known.min(), std)
        statistics = dict(zip(statistics, map(float, found), strict=True))
    off = "Importance is not measured (use_dynamic_adaptation=False)."
    return {
        "total_parameters": len(known),
        "high_importance_params": int((known > 1.5 * known.mean()).sum()) if len(known) else 0,
        "low_importance_params": int((known < 0.5 * known.mean()).sum()) if len(known) else 0,
        "importance_statistics": statistics,
        "message": "" if len(known) else _NO_STEP if on else off,
    }


def lr_mask_analysis(optimizer: AdaptiveHinaAdamW) -> Report:
    """Where the factors mask/lr lie, as they act with the learning rate of now."""
    on = optimizer.switches["use_lr_mask"]
    found = list(_masks(optimizer)) if on else []
    names, analysis = optimizer.roles.names, []
    count, total, squares = 0, 0.0, 0.0
    lowest, highest = math.inf, -math.inf
    for mask in found:
        least, most = float(mask.factors.min()), float(mask.factors.max())
        own = float(mask.factors @ mask.counts.double())
        analysis.append(
            {
                "param_name": names[mask.param],
                "param_shape": tuple(mask.param.shape),
                "phase": "warmup" if mask.moves else "post_warmup",
                "avg_lr_scale": own / mask.param.numel(),
                "lr_scale_range": (least, most),
            }
        )
        count += mask.param.numel()
        total += own
        squares += float(mask.factors.square() @ mask.counts.double())
        lowest, highest = min(lowest, least), max(highest, most)
    mean = total / max(count, 1)
    warming_up = sum(one["phase"] == "warmup" for one in analysis)
    off = "There is no lr_mask (use_lr_mask=False)."
    return {
        "lr_mask_enabled": on,
        "configuration": {
            key: optimizer.settings[key] for key in ("lr_bump", "min_lr", "max_lr", "warmup_steps")
        },
        "parameter_analysis": analysis,
        "global_statistics": {
            "total_parameters": len(analysis),
            "warmup_parameters": warming_up,
            "post_warmup_parameters": len(analysis) - warming_up,
            "avg_lr_scale": mean,
            "lr_scale_std": max(squares / max(count, 1) - mean * mean, 0.0) ** 0.5,
            "lr_scale_range": (lowest, highest) if found else (0.0, 0.0),
        },
        "message": "" if found else _NO_STEP if on else off,
    }


class _Mask(NamedTuple):
    """The masks of a parameter.

    Args:
        moves: whether they still do.
        factors: on lr, those that elements have, float64.
        counts: of the elements that have each.
    """

    param: Tensor
    moves: bool
    factors: Tensor
    counts: Tensor


def _masks(optimizer: AdaptiveHinaAdamW) -> Iterator[_Mask]:
    for group in optimizer.param_groups:
        for param in group["params"]:
            entry = optimizer.state.get(param, {})
            tally = optimizer.lr_mask.tally(entry, group["lr"])
            if tally is not None:
                yield _Mask(param, "lr_walk" in entry, *tally)


def snapshot(optimizer: AdaptiveHinaAdamW) -> Report:
    """What has been found of each parameter, in JSON's types, to be kept and drawn later.

    - `step`; `names` ("" without) and `shapes` of all parameters, in their order
    - `importances`, one a parameter, to six digits; empty where they are not measured
    - `relations`, each pair once: `pair` (the indices of P and Q), `product`, `compatibility`,
      `product_norm`, these to six digits
    - `lr_mask`: `counts` of elements by their factors on lr, in bins between `lr_mask_edges`, and
      whether any mask still `moves`
    """
    overview = optimizer.overview()
    importance = importances(overview).tolist()
    pairs: dict[frozenset[int], Report] = {}
    for index, partner, relation in _relations(overview):
        found = {
            "pair": [index, partner],
            "product": relation["product"],
            "compatibility": _rounded(relation["compatibility"]),
            "product_norm": _rounded(relation["product_norm"]),
        }
        pairs.setdefault(frozenset((index, partner)), found)
    return {
        "step": max((entry.get("step", 0) for entry in overview.entries), default=0),
        "names": overview.names,
        "shapes": [list(param.shape) for param in overview.params],
        "importances": [_rounded(value) for value in importance]
        if optimizer.switches["use_dynamic_adaptation"]
        else [],
        "relations": list(pairs.values()),
        "lr_mask_edges": list(_EDGES),
        "lr_mask": _mask_histogram(optimizer),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _mask_histogram(optimizer: AdaptiveHinaAdamW) -> Report:
    """How many elements have which factor, in bins of equal ratio."""
    inner = torch.tensor(_EDGES[1:-1], dtype=torch.float64)
    counts = torch.zeros(len(_EDGES) - 1, dtype=torch.int64)
    moves = False
    for found in _masks(optimizer) if optimizer.switches["use_lr_mask"] else ():
        bins = torch.bucketize(found.factors.cpu(), inner, right=True)
        counts.index_add_(0, bins, found.counts.cpu())
        moves = moves or found.moves
    return {"counts": counts.tolist(), "moves": moves}


def buffer_pool_stats(optimizer: AdaptiveHinaAdamW) -> Report:
    """The scratch memory that is kept between discoveries, in MiB."""
    stats = optimizer.scratch.stats()
    message = "" if stats["total_buffers"] else "No scratch memory is held."
    return {**stats, "message": message}
