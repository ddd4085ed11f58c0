"""What a run can ask an optimizer about its last step."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .engine import ChainOptimizer

# Figures that differ by role by design; all others are one mean over the tensors.
_BY_ROLE = ("effective_lr", "weight_decay")


@runtime_checkable
class _TellsPairs(Protocol):
    """An optimizer that says what it found by name."""

    def get_optimization_info(self) -> dict[str, Any]: ...

    def diagnose_lora_pairing(self) -> dict[str, Any]: ...


def optimizer_report(optimizer: Any) -> dict[str, float]:
    """Flat figures of the last step, as means over tensors; empty before one and for optimizers
    of other libraries.

    One copy from the device, however many tensors there are: it is called at every step.

    `effective_lr/<role>` (lr times the pair's factor), `weight_decay/<role>`, and what the chain's
    techniques note: `tam/alignment` (ŝ), `cautious/masked_share` (share of elements that did not
    move), `spd/projected_share` (share of tensors pulled back).

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


def optimizer_summary(optimizer: Any) -> list[str]:
    """What the log should say of an optimizer when a run begins; empty for other libraries'.

    The techniques that are on, how many LoRA and LoKr pairs were found by name and out of how many
    halves, and which halves have no partner.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, _TellsPairs):
        return []
    info = optimizer.get_optimization_info()
    switches = [name for name, value in info["features"].items() if value is True]
    lora, lokr = info["lora_stats"], info["lokr_stats"]
    bits = info["features"]["optim_bits"]
    lines = [f"techniques on: {', '.join(switches) or 'none'}; {bits}-bit state"]
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
    unpaired = optimizer.diagnose_lora_pairing()["unpaired"]
    lines += [f"without a partner: {u['name']} {list(u['shape'])}: {u['reason']}" for u in unpaired]
    return lines
