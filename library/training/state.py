"""The exact state of a run: what `--save_state` writes and `--resume` reads.

A state is a folder. `manifest.json` is its list of contents with sizes and SHA-256 sums, written
last: a folder whose manifest is missing or disagrees is incomplete and is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from library.training.errors import UserError
from library.training.files import recover_folder, write_folder_atomically

MANIFEST = "manifest.json"
FORMAT = 3


@dataclass
class Progress:
    """Where a run stands: the next batch to train on and what the log needs to go on."""

    step: int = 0
    epoch: int = 0
    index: int = 0  # of the next micro-batch in `epoch`
    batches_per_epoch: int = 0
    num_processes: int = 1
    seed: int = 0
    optimizer: str = ""  # its class, by import path
    recent_losses: list[float] = field(default_factory=list)
    history: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainingState:
    """All that decides how a run goes on."""

    progress: Progress
    network: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any]
    scaler: dict[str, Any]
    random: list[dict[str, Any]]  # one entry a process


def random_state() -> dict[str, Any]:
    """The global generators' states: dropout inside the network draws from them."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global generators; a run that moved to fewer or more GPUs keeps the common ones."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device in range(min(len(state["cuda"]), torch.cuda.device_count())):
            torch.cuda.set_rng_state(state["cuda"][device], device)


def save_state(path: Path, state: TrainingState) -> Path:
    """Write `state` as the folder `path`, whole or not at all."""

    def write(folder: Path) -> None:
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in state.network.items()
        }
        save_file(tensors, str(folder / "network.safetensors"))
        torch.save(state.optimizer, folder / "optimizer.pt")
        torch.save(state.lr_scheduler, folder / "lr_scheduler.pt")
        torch.save(state.scaler, folder / "scaler.pt")
        for rank, entry in enumerate(state.random):
            torch.save(entry, folder / f"random_{rank}.pt")
        (folder / "progress.json").write_text(json.dumps(asdict(state.progress)), encoding="utf-8")
        contents = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(folder.iterdir())
        }
        manifest = {"format": FORMAT, "contents": contents}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    return write_folder_atomically(path, write)


def load_state(path: Path) -> TrainingState:
    """Read a state back; UserError if it is incomplete or damaged."""
    problems = check_state(path)
    if problems:
        raise UserError.listing(problems)
    ranks = sorted(path.glob("random_*.pt"), key=lambda file: int(file.stem.split("_")[1]))
    return TrainingState(
        progress=Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8"))),
        network=load_file(path / "network.safetensors"),
        optimizer=_load(path / "optimizer.pt"),
        lr_scheduler=_load(path / "lr_scheduler.pt"),
        scaler=_load(path / "scaler.pt"),
        random=[_load(file) for file in ranks],
    )


def saved_progress(path: Path) -> Progress | None:
    """Where the run stood that wrote the state at `path`; None if that is no readable state.

    What is wrong with one, `check_state` says.
    """
    recover_folder(path)
    try:
        return Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def check_state(path: Path) -> list[str]:
    """What is wrong with the state at `path`, in words for the user; empty if it can be resumed."""
    if not path.is_dir():
        return [f"--resume: there is no folder {path}. States are the folders ending in '-state'."]
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        return [
            f"--resume: {path} has no {MANIFEST}, so it is no state of this trainer, or was cut "
            "off while it was copied. Choose another '-state' folder."
        ]
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        contents = manifest["contents"]
        version = manifest["format"]
    except (ValueError, KeyError, TypeError):
        return [f"--resume: {manifest_file} is damaged. Choose another '-state' folder."]
    if version != FORMAT:
        return [f"--resume: {path} was written in format {version}; this version reads {FORMAT}."]
    problems = []
    for name, expected in contents.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(
                f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            )
        elif _sha256(file) != expected["sha256"]:
            problems.append(f"{name} was changed after it was written")
    if problems:
        return [
            f"--resume: the state {path} is incomplete ({'; '.join(problems)}). "
            "Choose another '-state' folder, or start from --network_weights."
        ]
    return []


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
