"""Interrupted runs go on exactly: kill -9, Ctrl-C, and a resume in the middle of an epoch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import ROOT, command, environment, same_weights, train, words, write_dataset
from safetensors.torch import load_file

from library.training.state import check_state

pytestmark = pytest.mark.slow

NETWORKS = {
    "lora": {"network_module": "networks.lora", "network_args": ["rank_dropout=0.1"]},
    "lokr": {"network_module": "networks.lokr", "network_args": ["factor=4"]},
}

NUMBERS = {"lora": (40, 18), "lokr": (14, 6)}  # all steps, and at which the run is killed


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended before it was interrupted"
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.02)


@pytest.mark.parametrize("network", NETWORKS)
def test_as_many_steps_as_with_a_kill_between(tmp_path: Path, network: str) -> None:
    # 7 pictures in batches of 2 make epochs of 4: steps 18 and 6 lie inside one.
    steps, saved = NUMBERS[network]
    options = dict(
        **NETWORKS[network],
        dataset_config=write_dataset(tmp_path / "data", extra="shuffle_caption = true"),
        caption_dropout_rate=0.2,
        lr_scheduler="cosine",
        max_train_steps=steps,
        save_every_n_steps=saved,
        save_state=True,
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(output_dir=whole, **options)
    process = subprocess.Popen(
        command(output_dir=parts, **options), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
    )
    state = parts / f"short-step{saved:08}-state"
    wait_for(state, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (parts / "short.safetensors").exists()
    assert check_state(state) == []
    train(output_dir=parts, resume=state, **options)
    assert same_weights(whole / "short.safetensors", parts / "short.safetensors")
    start = load_file(parts / f"short-step{saved:08}.safetensors")
    end = load_file(parts / "short.safetensors")
    assert any(not start[name].equal(end[name]) for name in start)


def test_ctrl_c_saves_and_ends(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(
        command(
            dataset_config=write_dataset(tmp_path / "data"),
            output_dir=output,
            max_train_steps=100000,
            save_every_n_steps=2,
            save_last_n_steps=2,
            save_state_on_train_end=True,
        ),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(output / "short-step00000002.safetensors", process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert load_file(output / "short.safetensors")
    assert check_state(output / "short-state") == []
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to process groups")
@pytest.mark.parametrize(
    ("start_method", "number"), [("fork", signal.SIGINT), ("spawn", signal.SIGTERM)]
)
def test_a_signal_to_all_processes_is_left_to_the_main_one(
    tmp_path: Path, start_method: str, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    program = (
        "import multiprocessing, sys, train_network\n"
        f"multiprocessing.set_start_method({start_method!r})\n"
        "sys.exit(train_network.main(sys.argv[1:]))"
    )
    options = words(
        dataset_config=write_dataset(tmp_path / "data"),
        output_dir=output,
        cache_latents=False,
        max_data_loader_n_workers=1,
        max_train_steps=100000,
        save_every_n_steps=2,
        save_last_n_steps=2,
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *options],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(output / "short-step00000002.safetensors", process)
    workers = psutil.Process(process.pid).children()
    os.killpg(process.pid, number)  # as a terminal does with Ctrl-C, and `timeout` with SIGTERM
    if number == signal.SIGINT:
        for worker in workers:
            worker.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.count("stopping after this step") == 1
    assert load_file(output / "short.safetensors")
