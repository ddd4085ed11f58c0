"""What AdaptiveHinaAdamW tells of a run (spec 1 §4). The keys are the same at every moment: before
anything is known there are zeros, and `message` says so; later it is empty."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .techniques.importance import importances

if TYPE_CHECKING:
    from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW

Report = dict[str, Any]

_NO_STEP = "No step has been taken yet."


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
    place = {name: index for index, name in enumerate(overview.names) if name}
    relationships = []
    for index, entry in enumerate(overview.entries):
        if "relation" not in entry:
            continue
        relation = entry["relation"]
        partner = place.get(relation["partner"], relation["partner"])
        if not isinstance(partner, int) or partner >= len(overview.params):
            continue  # a partner that is no longer trained
        relationships.append(
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
        )
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
    found = list(_mask_scales(optimizer)) if on else []
    names, analysis = optimizer.roles.names, []
    count, total, squares = 0, 0.0, 0.0
    lowest, highest = math.inf, -math.inf
    for param, warming, scale in found:
        least, most = float(scale.min()), float(scale.max())
        analysis.append(
            {
                "param_name": names[param],
                "param_shape": tuple(param.shape),
                "phase": "warmup" if warming else "post_warmup",
                "avg_lr_scale": float(scale.mean()),
                "lr_scale_range": (least, most),
            }
        )
        count += scale.numel()
        total += float(scale.sum())
        squares += float(scale.square().sum())
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


def _mask_scales(optimizer: AdaptiveHinaAdamW) -> Iterator[tuple[Tensor, bool, Tensor]]:
    """Each parameter, whether its mask still moves, and the factor of each element."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            entry = optimizer.state.get(param, {})
            scale = optimizer.lr_mask.factors(entry, group["lr"])
            if scale is not None and scale.numel():
                yield param, "lr_walk" in entry, scale


def buffer_pool_stats(optimizer: AdaptiveHinaAdamW) -> Report:
    """The scratch memory that is kept between discoveries, in MiB."""
    stats = optimizer.scratch.stats()
    message = "" if stats["total_buffers"] else "No scratch memory is held."
    return {**stats, "message": message}
