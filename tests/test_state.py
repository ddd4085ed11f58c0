"""States are written whole, checked before use, and read back exactly."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from library.training.errors import UserError
from library.training.files import write_atomically, write_folder_atomically
from library.training.state import (
    Progress,
    TrainingState,
    check_state,
    load_state,
    random_state,
    restore_random_state,
    save_state,
)


def make_state() -> TrainingState:
    parameter = torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return TrainingState(
        progress=Progress(step=7, epoch=1, index=3, recent_losses=[0.1 + 0.2, 1e-17]),
        network={"a.lora_down.weight": parameter.detach(), "a.alpha": torch.tensor(4.0)},
        optimizer=optimizer.state_dict(),
        lr_scheduler={"last_epoch": 7, "_last_lr": [0.1]},
        scaler={},
        random=[random_state(), random_state()],
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    state = make_state()
    loaded = load_state(save_state(tmp_path / "x-state", state))
    assert loaded.progress == state.progress
    assert loaded.lr_scheduler == state.lr_scheduler
    for name, tensor in state.network.items():
        assert torch.equal(loaded.network[name], tensor)
    moment = loaded.optimizer["state"][0]["exp_avg"]
    assert torch.equal(moment, state.optimizer["state"][0]["exp_avg"])
    assert len(loaded.random) == 2


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    state = make_state()
    loaded = load_state(save_state(tmp_path / "x-state", state))
    restore_random_state(state.random[0])
    expected = (random.random(), np.random.rand(), torch.rand(3).tolist())
    torch.rand(100)
    restore_random_state(loaded.random[0])
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


@pytest.mark.parametrize("name", ["optimizer.pt", "network.safetensors", "manifest.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = save_state(tmp_path / "x-state", make_state())
    (path / name).unlink()
    (problem,) = check_state(path)
    assert name in problem
    with pytest.raises(UserError, match="--resume"):
        load_state(path)


def test_truncated_and_edited_files_are_noticed(tmp_path: Path) -> None:
    path = save_state(tmp_path / "x-state", make_state())
    assert check_state(path) == []
    whole = (path / "optimizer.pt").read_bytes()
    (path / "optimizer.pt").write_bytes(whole[:-10])
    assert "bytes instead of" in check_state(path)[0]
    (path / "optimizer.pt").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "was changed" in check_state(path)[0]


def test_states_of_another_format_and_damaged_manifests_are_refused(tmp_path: Path) -> None:
    path = save_state(tmp_path / "x-state", make_state())
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    assert "format 99" in check_state(path)[0]
    (path / "manifest.json").write_text("{")
    assert "damaged" in check_state(path)[0]
    assert "no folder" in check_state(tmp_path / "nowhere")[0]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    write_atomically(path, lambda file: file.write_bytes(b"good"))

    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"good"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x-state"
    write_folder_atomically(path, lambda folder: (folder / "old").touch())
    write_folder_atomically(path, lambda folder: (folder / "new").touch())
    assert [file.name for file in path.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["x-state"]
