"""Federated runs as processes, and the same rounds without Flower."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import ROOT, environment
from safetensors.numpy import load_file

from lora.federated.client import FederatedClient
from lora.federated.journal import STATE
from lora.federated.settings import DEFAULT_CONFIG, Settings
from lora.federated.wire import free_port

# One step of AdamW each costs nothing; HinaAdamW, the default, is compiled first.
QUICK = {"optimizer": "AdamW", "epochs": 1, "batch_size": 64, "clients": 4, "rounds": 3}


def start(role: str, *arguments: str, fault: str = "", **options: Any) -> subprocess.Popen[str]:
    """A process of a run; with a `fault`, one of `faulty_client.py`."""
    script = [str(ROOT / "tests" / "faulty_client.py")] if fault else ["-m", "lora.federated"]
    command = [sys.executable, *script, *([role] if role else []), *arguments]
    command += [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | {"OMP_NUM_THREADS": "1", "FAULT": fault, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def result(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / STATE)


def by_hand(took_part: list[list[int]], **options: Any) -> dict[str, np.ndarray]:
    """FedAvg over those clients in each round, in float64 and without Flower."""
    settings = Settings.of_file(DEFAULT_CONFIG, **options)
    clients = [FederatedClient.of(settings, k) for k in range(settings.clients)]
    names = list(clients[0].model.adapter_state())
    tensors = clients[0].model.get_parameters()
    for number, members in enumerate(took_part, start=1):
        answers = [clients[k].fit([t.copy() for t in tensors], {"round": number}) for k in members]
        whole = sum(count for _, count, _ in answers)
        sums = [
            sum(arrays[k].astype(np.float64) * count for arrays, count, _ in answers)
            for k in range(len(names))
        ]
        tensors = [np.asarray(one / whole, np.float32) for one in sums]
    return dict(zip(names, tensors, strict=True))


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """To what rounding leaves of it: Adam's first steps divide small numbers by small ones."""
    assert one.keys() == other.keys()
    return all(np.abs(one[name] - other[name]).max() < 1e-4 for name in one)


def one_thread() -> None:
    """As in the processes, so that sums are rounded alike."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
