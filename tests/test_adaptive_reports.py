"""What AdaptiveHinaAdamW reports: the same keys at every moment, and numbers that are right."""

import copy
import io
import json
import pickle
import statistics
from typing import Any

import pytest
import torch
from factored_models import Adapter, train
from optimizers import drawn, parameters
from torch import Tensor, nn

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW

REPORTS = (
    "get_optimization_info",
    "get_relationship_summary",
    "get_importance_analysis",
    "get_lr_mask_analysis",
    "get_buffer_pool_stats",
)
# As spec 1 §4 lists them; a star stands for each element of a list.
SPEC = {
    "get_optimization_info": {
        "optimizer_type",
        "version",
        "total_params",
        "features",
        "adaptation_config",
        "lr_mask_config",
        "training_stats",
        "training_stats.global_step",
        "training_stats.total_relationships",
        "training_stats.avg_importance_score",
        "training_stats.lr_mask_stats",
        "training_stats.lr_mask_stats.avg_lr_scale",
        "message",
    },
    "get_relationship_summary": {
        "total_relationships",
        "relationships",
        "relationships.*.param_shape",
        "relationships.*.partner_shape",
        "relationships.*.compatibility",
        "relationships.*.joint_importance",
        "relationships.*.interaction_type",
        "relationships.*.param_name",
        "relationships.*.partner_name",
        "message",
    },
    "get_importance_analysis": {
        "total_parameters",
        "high_importance_params",
        "low_importance_params",
        "importance_statistics",
        "importance_statistics.mean",
        "importance_statistics.max",
        "importance_statistics.min",
        "importance_statistics.std",
        "message",
    },
    "get_lr_mask_analysis": {
        "lr_mask_enabled",
        "configuration",
        "parameter_analysis",
        "global_statistics",
        "global_statistics.total_parameters",
        "global_statistics.warmup_parameters",
        "global_statistics.post_warmup_parameters",
        "global_statistics.avg_lr_scale",
        "global_statistics.lr_scale_std",
        "global_statistics.lr_scale_range",
        "message",
    },
    "get_buffer_pool_stats": {
        "total_buffer_types",
        "total_buffers",
        "estimated_memory_mb",
        "message",
    },
}
LR, INTERVAL, WARMUP = 1e-3, 10, 20
SETTINGS: dict[str, Any] = {
    "relationship_discovery_interval": INTERVAL,
    "warmup_steps": WARMUP,
    "max_lr": 2e-3,
}


def adaptive(model: nn.Module, named: bool = True, **options: Any) -> AdaptiveHinaAdamW:
    items = model.named_parameters() if named else model.parameters()
    return AdaptiveHinaAdamW(items, lr=LR, **{**SETTINGS, **options})


def run(model: nn.Module, optimizer: AdaptiveHinaAdamW, steps: int) -> None:
    for _ in train(model, optimizer, steps):
        pass


def told(optimizer: AdaptiveHinaAdamW) -> dict[str, dict[str, Any]]:
    """All reports; strict JSON can hold each."""
    reports = {name: getattr(optimizer, name)() for name in REPORTS}
    for report in reports.values():
        json.dumps(report, allow_nan=False)
    return reports


def keys(report: Any, above: str = "") -> set[str]:
    """All keys, with those above them."""
    found = set()
    if isinstance(report, dict):
        for key, value in report.items():
            found |= {above + key} | keys(value, f"{above}{key}.")
    elif isinstance(report, list):
        for each in report:
            found |= keys(each, f"{above}*.")
    return found


def fixed(report: Any) -> set[str]:
    """The keys that are there whatever has been found."""
    return {key for key in keys(report) if "*" not in key}


def test_the_keys_are_the_same_at_every_moment_of_a_run():
    model = Adapter(repeats=1)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
    optimizer = adaptive(model)
    moments = {"before the first step": told(optimizer)}
    run(model, optimizer, 1)
    moments["after the first step"] = told(optimizer)
    run(model, optimizer, 4)
    moments["in warm-up"] = told(optimizer)
    run(model, optimizer, INTERVAL - 5)
    moments["after a discovery"] = told(optimizer)
    run(model, optimizer, WARMUP)
    moments["after the freeze"] = told(optimizer)
    moments["deep-copied"] = told(copy.deepcopy(optimizer))
    moments["pickled"] = told(pickle.loads(pickle.dumps(optimizer)))
    for name, named in (("loaded", True), ("loaded without names", False)):
        loaded = adaptive(copy.deepcopy(model), named)
        loaded.load_state_dict(optimizer.state_dict())
        moments[name] = told(loaded)
    optimizer.clear_buffer_pool()
    moments["scratch memory freed"] = told(optimizer)
    for switches in ([], ["use_lr_mask"], ["use_dynamic_adaptation"]):
        on = dict.fromkeys(AdaptiveHinaAdamW.SWITCHES, False) | dict.fromkeys(switches, True)
        other = adaptive(copy.deepcopy(model), **on)
        moments[f"{switches} before the first step"] = told(other)
        run(model, other, 2)
        moments[f"{switches} after two"] = told(other)
        other.load_state_dict(optimizer.state_dict())
        moments[f"{switches} with another's state"] = told(other)
    first = moments["before the first step"]
    for moment, reports in moments.items():
        for name, report in reports.items():
            assert fixed(report) == fixed(first[name]), (moment, name)
    after = moments["after the freeze"]
    for name, wanted in SPEC.items():
        assert wanted <= keys(after[name])
    assert {name for name, report in after.items() if report["message"]} <= {
        "get_buffer_pool_stats"
    }


def test_before_the_first_step_there_are_zeros_and_a_message():
    reports = told(adaptive(Adapter(repeats=1)))
    for report in reports.values():
        assert report["message"]
    assert reports["get_relationship_summary"]["total_relationships"] == 0
    assert reports["get_relationship_summary"]["relationships"] == []
    importance = reports["get_importance_analysis"]
    assert importance["total_parameters"] == 0
    assert set(importance["importance_statistics"].values()) == {0.0}
    mask = reports["get_lr_mask_analysis"]
    assert mask["lr_mask_enabled"] is True
    assert mask["parameter_analysis"] == []
    statistics_of_masks = dict(mask["global_statistics"])
    assert tuple(statistics_of_masks.pop("lr_scale_range")) == (0.0, 0.0)
    assert set(statistics_of_masks.values()) == {0}
    info = reports["get_optimization_info"]
    assert info["training_stats"]["global_step"] == 0
    assert info["total_params"] == 6


@pytest.mark.parametrize(
    ("off", "silent"),
    [
        ("use_lr_mask", {"get_lr_mask_analysis"}),
        ("use_dynamic_adaptation", {"get_relationship_summary", "get_importance_analysis"}),
    ],
)
def test_a_message_says_what_is_switched_off(off: str, silent: set[str]):
    model = Adapter(repeats=1)
    optimizer = adaptive(model, **{off: False})
    run(model, optimizer, INTERVAL)
    reports = told(optimizer)
    for name in REPORTS[:4]:
        assert (off in reports[name]["message"]) == (name in silent)
    assert reports["get_lr_mask_analysis"]["lr_mask_enabled"] == (off != "use_lr_mask")
    assert reports["get_optimization_info"]["features"][off] is False


def importances_of(optimizer: AdaptiveHinaAdamW, params: list[Tensor]) -> list[float]:
    """From the state, divided by their mean."""
    kept = [optimizer.state[p]["importance"] for p in params if p in optimizer.state]
    return [each / statistics.fmean(kept) for each in kept]


def test_the_numbers_of_importance_are_those_of_the_state():
    """Gradients of each parameter are twice as large as those of the one before; the first is zero
    and stays so, the last has never taken a step."""
    params = parameters(torch.zeros(6, 5), *drawn(*[(6, 5)] * 8))
    optimizer = AdaptiveHinaAdamW(params, lr=LR, **SETTINGS)
    for step in range(3 * INTERVAL):
        for k, p in enumerate(params[:8]):
            p.grad = (2.0**k if k else 0.0) * drawn((6, 5), seed=10 * step + k)[0]
        optimizer.step()
    found = importances_of(optimizer, params)
    analysis = optimizer.get_importance_analysis()
    assert analysis["total_parameters"] == len(found) == 8
    assert analysis["high_importance_params"] == sum(each > 1.5 for each in found) > 0
    assert analysis["low_importance_params"] == sum(each < 0.5 for each in found) > 0
    wanted = {"mean": 1.0, "max": max(found), "min": min(found), "std": statistics.pstdev(found)}
    assert analysis["importance_statistics"] == pytest.approx(wanted, rel=1e-9)


def test_the_numbers_of_relations_are_those_of_parameters_and_state():
    model = Adapter(repeats=3)
    named = dict(model.named_parameters())
    params, names = list(named.values()), list(named)
    optimizer = adaptive(model)
    run(model, optimizer, INTERVAL)
    summary = optimizer.get_relationship_summary()
    found = importances_of(optimizer, params)
    assert summary["total_relationships"] == len(summary["relationships"]) == 18
    for index, one in enumerate(summary["relationships"]):
        relation = optimizer.state[params[index]]["relation"]
        partner = names.index(relation["partner"])
        assert one == {
            "param_name": names[index],
            "partner_name": names[partner],
            "param_index": index,
            "partner_index": partner,
            "param_shape": tuple(params[index].shape),
            "partner_shape": tuple(params[partner].shape),
            "compatibility": relation["compatibility"],
            "joint_importance": pytest.approx((found[index] + found[partner]) / 2, rel=1e-9),
            "interaction_type": "P·Q" if "lora_up" in names[index] else "Q·P",
            "product_norm": relation["product_norm"],
        }
        assert model.partners()[names[index]] == names[partner]


def masks_told(optimizer: AdaptiveHinaAdamW, scales: list[Tensor], frozen: bool) -> None:
    """Hold the report against the factors of all elements."""
    analysis = optimizer.get_lr_mask_analysis()
    phase = "post_warmup" if frozen else "warmup"
    assert [one["phase"] for one in analysis["parameter_analysis"]] == [phase] * len(scales)
    for one, scale in zip(analysis["parameter_analysis"], scales, strict=True):
        assert one["avg_lr_scale"] == pytest.approx(float(scale.mean()), rel=1e-9)
        ends = [float(scale.min()), float(scale.max())]
        assert one["lr_scale_range"] == pytest.approx(ends, rel=1e-9)
    every = torch.cat([scale.flatten() for scale in scales])
    assert analysis["global_statistics"] == {
        "total_parameters": len(scales),
        "warmup_parameters": 0 if frozen else len(scales),
        "post_warmup_parameters": len(scales) if frozen else 0,
        "avg_lr_scale": pytest.approx(float(every.mean()), rel=1e-9),
        "lr_scale_std": pytest.approx(float(every.std(correction=0)), rel=1e-6),
        "lr_scale_range": pytest.approx([float(every.min()), float(every.max())], rel=1e-9),
    }


def test_the_numbers_of_masks_are_those_of_the_masks():
    model = Adapter(repeats=1)
    params = list(model.parameters())
    optimizer = adaptive(model)
    run(model, optimizer, WARMUP // 2)
    masks = [optimizer.masks(p) for p in params]
    assert len({float(each) for mask in masks for each in mask.flatten()}) > 3  # they have moved
    masks_told(optimizer, [mask / LR for mask in masks], frozen=False)
    run(model, optimizer, WARMUP)
    masks = [optimizer.masks(p) for p in params]
    masks_told(optimizer, [mask / LR for mask in masks], frozen=True)
    # Behind the highest learning rate a frozen mask falls as it does, to a tenth and no lower.
    for lr, share in ((0.4 * LR, 0.4), (0.02 * LR, 0.1)):
        optimizer.param_groups[0]["lr"] = lr
        scales = [(mask * share / lr).clamp(0.001, 10) for mask in masks]
        masks_told(optimizer, scales, frozen=True)
    configuration = optimizer.get_lr_mask_analysis()["configuration"]
    assert configuration == {
        "lr_bump": 3e-6,
        "min_lr": 1e-7,
        "max_lr": 2e-3,
        "warmup_steps": WARMUP,
    }


def test_the_info_brings_together_what_the_others_say():
    model = Adapter(repeats=2)
    optimizer = adaptive(model, adaptation_strength=0.7, compatibility_threshold=0.2)
    run(model, optimizer, INTERVAL)
    run(model, optimizer, 3)
    info, reports = optimizer.get_optimization_info(), told(optimizer)
    assert info["optimizer_type"] == "AdaptiveHinaAdamW"
    assert info["total_params"] == 12
    assert info["adaptation_config"] == {
        "adaptation_strength": 0.7,
        "relationship_discovery_interval": INTERVAL,
        "importance_decay": 0.95,
        "compatibility_threshold": 0.2,
    }
    masks = reports["get_lr_mask_analysis"]
    assert info["lr_mask_config"] == masks["configuration"]
    assert info["training_stats"] == {
        "global_step": INTERVAL + 3,
        "total_relationships": 12,
        "avg_importance_score": pytest.approx(1.0, abs=1e-9),
        "lr_mask_stats": masks["global_statistics"],
    }
    assert info["features"].keys() > set(AdaptiveHinaAdamW.SWITCHES)


def test_reports_change_nothing():
    model = Adapter(repeats=1)
    twin = copy.deepcopy(model)
    asked, silent = adaptive(model), adaptive(twin)
    for _ in range(2 * INTERVAL):
        run(model, asked, 1)
        told(asked)
        run(twin, silent, 1)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loaded_state_reports_as_the_saved_one_did():
    model = Adapter(repeats=1)
    optimizer = adaptive(model)
    run(model, optimizer, INTERVAL + 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = adaptive(copy.deepcopy(model))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    before, after = told(optimizer), told(loaded)
    for name in REPORTS[:4]:
        assert after[name] == before[name]
