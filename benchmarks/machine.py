"""Where a figure was measured."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Processor, threads, versions and date; nothing that tells whose machine it is."""
    told: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        # How many programs wanted a core in the last minute. Waiting threads that spin, as those of
        # fused AdamW do, cost ten times more where another program has their core.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        told["gpu"] = torch.cuda.get_device_name()
    return told


def in_words(machine: dict[str, Any]) -> str:
    processor = machine.get("gpu", machine["cpu"])
    return (
        f"{processor}, {machine['threads']} threads on {machine['cores']} cores, "
        f"Python {machine['python']}, torch {machine['torch']}, {machine['date']}"
    )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
