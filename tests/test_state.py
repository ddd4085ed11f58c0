"""States are written whole, checked before use, and read back exactly."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from library.training.errors import UserError
from library.training.files import recover_folder, write_atomically, write_folder_atomically
from library.training.options import Options
from library.training.run_checks import run_problems
from library.training.state import (
    Progress,
    TrainingState,
    check_state,
    load_state,
    random_state,
    restore_random_state,
    save_state,
    saved_progress,
)

ROOT = Path(__file__).parent.parent


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


def only_file(folder: Path) -> str:
    (file,) = folder.iterdir()
    return file.name


@pytest.mark.parametrize("error", [PermissionError("locked"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_exchange_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException
) -> None:
    path = tmp_path / "x-state"
    write_folder_atomically(path, lambda folder: (folder / "old").touch())
    calls = iter(range(1, 100))
    replace = os.replace

    def fail_once(source: Path, target: Path) -> None:
        if next(calls) == failing:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(type(error)):
        write_folder_atomically(path, lambda folder: (folder / "new").touch())
    assert only_file(path) == "old"
    assert only_file(tmp_path) == "x-state"


def killed_at_rename(path: Path, number: int) -> None:
    """Begin to replace the folder `path` in a process that dies at its rename of that number."""
    program = f"""
import os
from pathlib import Path
from library.training.files import write_folder_atomically

calls, replace = iter(range(1, 100)), os.replace
os.replace = lambda *paths: os._exit(9) if next(calls) == {number} else replace(*paths)
write_folder_atomically(Path({str(path)!r}), lambda folder: (folder / "new").touch())
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 9


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_between_the_renames_leaves_the_old_folder(tmp_path: Path, number: int) -> None:
    path = tmp_path / "x-state"
    write_folder_atomically(path, lambda folder: (folder / "old").touch())
    killed_at_rename(path, number)
    recover_folder(path)
    assert only_file(path) == "old"
    for nothing_to_do in (path, tmp_path / "nowhere", Path(".")):
        recover_folder(nothing_to_do)
    assert only_file(path) == "old"


def test_the_next_write_clears_up_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "x-state"
    write_folder_atomically(path, lambda folder: (folder / "old").touch())
    killed_at_rename(path, 2)

    def write(folder: Path) -> None:
        assert only_file(path) == "old"  # in its place again while the new one is written
        (folder / "newer").touch()

    write_folder_atomically(path, write)
    assert only_file(path) == "newer"
    assert only_file(tmp_path) == "x-state"


def test_a_state_is_recovered_where_it_is_looked_up(tmp_path: Path) -> None:
    path = save_state(tmp_path / "x-state", make_state())
    killed_at_rename(path, 2)
    assert not path.exists()
    options = Options(resume=str(path))
    assert not [line for line in run_problems(options, sdxl=False) if "--resume" in line]
    assert load_state(path).progress.step == 7


def test_the_place_is_known_also_of_a_state_that_stood_aside(tmp_path: Path) -> None:
    path = tmp_path / "x-state"
    save_state(path, make_state())
    path.rename(tmp_path / ".x-state.old")  # where a kill between two renames leaves it
    progress = saved_progress(path)
    assert progress is not None
    assert progress.step == 7
    assert saved_progress(tmp_path / "none-state") is None
