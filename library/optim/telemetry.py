"""What a run can ask an optimizer: of its last step, of what it has found, of how it is set."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .engine import ChainOptimizer

# Figures that differ by role by design; all others are one mean over the tensors.
_BY_ROLE = ("effective_lr", "weight_decay")
_MOST_LISTED = 8  # halves without a partner; where one half is frozen there are hundreds


@runtime_checkable
class _TellsItself(Protocol):
    """An optimizer that says how it is set."""

    def get_optimization_info(self) -> dict[str, Any]: ...


@runtime_checkable
class _TellsPairs(Protocol):
    """An optimizer that says what it found by name."""

    def diagnose_lora_pairing(self) -> dict[str, Any]: ...


@runtime_checkable
class _Adapts(Protocol):
    """An optimizer that finds out by itself."""

    def snapshot(self) -> dict[str, Any]: ...


@runtime_checkable
class _TakesLoss(Protocol):
    """An optimizer that wants to know the loss of each step."""

    def update_context(self, loss: float) -> None: ...


def tell_loss(optimizer: Any, loss: float) -> None:
    """Tell an optimizer the loss of the step that comes, if it wants to know.

    Args:
        optimizer: any optimizer, also one wrapped by accelerate.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if isinstance(optimizer, ChainOptimizer) and isinstance(optimizer, _TakesLoss):
        optimizer.update_context(loss)


def optimizer_report(optimizer: Any) -> dict[str, float]:
    """Flat figures of the last step, as means over tensors; empty before one and for optimizers
    of other libraries.

    One copy from the device, however many tensors there are: it is called at every step.

    `effective_lr/<role>` (lr times the pair's factor), `weight_decay/<role>`, and what the chain's
    techniques note: `tam/alignment` (ŝ), `cautious/masked_share` (share of elements that did not
    move), `spd/projected_share` (share of tensors pulled back), `lr_mask/factor` (the mean
    factor of lr_mask on lr), `importance/…` (what importance is measured by), `c_optim/…` (the mean
    cosine of gradient and momentum, and the multiplier on lr).

    Args:
        optimizer: any optimizer, also one wrapped by accelerate.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, ChainOptimizer):
        return {}
    on_device = [
        value.reshape(-1).float()
        for record in optimizer.last_step
        for value in record.values.values()
        if isinstance(value, Tensor)
    ]
    read = iter(_in_one_copy(on_device))
    values: dict[str, list[float]] = defaultdict(list)
    for record in optimizer.last_step:
        for name, value in record.values.items():
            for role in record.roles:
                own = next(read) if isinstance(value, Tensor) else value
                values[f"{name}/{role}" if name in _BY_ROLE else name].append(own)
    return {name: sum(own) / len(own) for name, own in sorted(values.items())}


def _in_one_copy(tensors: list[Tensor]) -> list[float]:
    if not tensors:
        return []
    figures: list[float] = torch.cat([each.to(tensors[0].device) for each in tensors]).tolist()
    return figures


def optimizer_snapshot(optimizer: Any) -> dict[str, Any] | None:
    """What an optimizer has found of each parameter so far, in JSON's types (keys: see
    `adaptive_reports.snapshot`); None for optimizers that look for nothing. Not for every step.

    Args:
        optimizer: any optimizer, also one wrapped by accelerate.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, ChainOptimizer) or not isinstance(optimizer, _Adapts):
        return None
    return optimizer.snapshot()


def optimizer_summary(optimizer: Any) -> list[str]:
    """What the log should say of an optimizer when a run begins; empty for other libraries'.

    The techniques that are on. How many LoRA and LoKr pairs were found by name and out of how many
    halves, and which halves have no partner; or what will be found out, and when.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, ChainOptimizer) or not isinstance(optimizer, _TellsItself):
        return []
    info = optimizer.get_optimization_info()
    switches = [name for name, value in info["features"].items() if value is True]
    bits = info["features"]["optim_bits"]
    lines = [f"techniques on: {', '.join(switches) or 'none'}; {bits}-bit state"]
    if isinstance(optimizer, _TellsPairs):
        lines += _pairs(info, optimizer.diagnose_lora_pairing()["unpaired"])
    if isinstance(optimizer, _Adapts):
        lines += _plans(info)
    return lines + info.get("plans", [])


def _pairs(info: dict[str, Any], unpaired: list[dict[str, Any]]) -> list[str]:
    lora, lokr = info["lora_stats"], info["lokr_stats"]
    lines = []
    if lora["lora_a_params"] or lora["lora_b_params"]:
        lines.append(
            f"LoRA pairs found: {lora['lora_pairs']} (of {lora['lora_a_params']} down and "
            f"{lora['lora_b_params']} up halves)"
        )
    if lokr["lokr_groups"]:
        lines.append(
            f"LoKr pairs found: {lokr['lokr_pairs']} of {lokr['lokr_groups']} modules "
            f"({lokr['lokr_w1_params']} w1 and {lokr['lokr_w2_params']} w2 tensors)"
        )
    lines += [
        f"without a partner: {u['name']} {list(u['shape'])}: {u['reason']}"
        for u in unpaired[:_MOST_LISTED]
    ]
    if len(unpaired) > _MOST_LISTED:
        lines.append(f"without a partner: {len(unpaired) - _MOST_LISTED} more")
    return lines


def _plans(info: dict[str, Any]) -> list[str]:
    """What an optimizer that adapts is going to do."""
    lines = []
    if info["features"]["use_dynamic_adaptation"]:
        interval = info["adaptation_config"]["relationship_discovery_interval"]
        lines.append(
            f"relations are looked for every {interval} steps, first at step {interval}; "
            "importance is measured at every step"
        )
    if info["features"]["use_lr_mask"]:
        mask = info["lr_mask_config"]
        lines.append(
            f"lr_mask moves until step {mask['warmup_steps']}, by {mask['lr_bump']:g} a step "
            f"between {mask['min_lr']:g} and {mask['max_lr']:g}"
        )
    return lines
