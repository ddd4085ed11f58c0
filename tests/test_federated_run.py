"""Federated runs as a user starts them: real processes over gRPC on loopback."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from certificates import certificates
from federated_runs import QUICK, by_hand, free_address, one_thread, result, same, start
from PIL import Image

from lora.federated.__main__ import main

pytestmark = pytest.mark.slow


def said_by(process: subprocess.Popen[str], seconds: float = 180) -> str:
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, said[-4000:]
    return said


def test_one_command_runs_server_and_clients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = said_by(start("", "--clients", "4", "--rounds", "3", output=tmp_path))
    history = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert [one["number"] for one in history] == [0, 1, 2, 3]
    accuracies = [one["accuracy"] for one in history]
    assert accuracies[3] > accuracies[0] + 0.3
    assert accuracies[3] > 0.8
    for one in history[1:]:
        assert f"round {one['number']}: accuracy {one['accuracy']:.3f}" in said
        assert one["left_out"] == {}
        assert set(one["clients"]) == {"client-0", "client-1", "client-2", "client-3"}
    full, less = re.search(r"whole model is ([\d.]+) MB: ([\d.]+)% less", said).groups()
    assert float(less) >= 98
    adapter = sum(tensor.nbytes for tensor in result(tmp_path).values())
    for one in history[1:]:
        for moved in one["traffic"].values():
            # What travels, and what gRPC, HTTP/2 and TCP's payload take beside it.
            assert adapter < moved["sent"] < 1.05 * adapter + 20_000
            assert adapter < moved["received"] < 1.05 * adapter + 20_000
    assert adapter < 0.02 * 1e6 * float(full)
    caplog.set_level("INFO", "lora.federated")
    assert main(["server", "--clients=4", "--rounds=3", f"--output={tmp_path}"]) == 0
    assert "all 3 rounds are done already" in caplog.text
    with Image.open(tmp_path / "rounds.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200


def test_clients_that_fail_are_named_and_left_out(tmp_path: Path) -> None:
    """Five processes, a fault in each round; what is left is the healthy clients' run."""
    one_thread()
    address, output = free_address(), tmp_path / "run"
    options = QUICK | {"address": address, "output": output}
    limits = {"round_timeout": 20, "join_timeout": 90}
    server = start("server", **options, **limits)
    faults = ["", "1:nan", "2:kill", "2:shape 3:slow"]
    clients = [
        start("client", number=number, fault=fault, **options, patience=10)
        for number, fault in enumerate(faults)
    ]
    try:
        said = said_by(server)
    finally:
        for client in clients:
            client.kill()
            client.communicate()
    rounds = json.loads((output / "history.json").read_text())["rounds"]
    left_out = [one["left_out"] for one in rounds]
    assert left_out[0] == {}
    assert left_out[1].keys() == {"client-1"}
    assert "NaN" in left_out[1]["client-1"]
    assert "lora_" in left_out[1]["client-1"], "the tensor is named"
    assert left_out[2].keys() == {"client-2", "client-3"}
    assert "connection was lost" in left_out[2]["client-2"]
    assert re.search(r"has shape \(\d+, \d+\) instead of", left_out[2]["client-3"])
    assert left_out[3].keys() == {"client-2", "client-3"}
    assert left_out[3]["client-2"] == "it is not there"
    assert left_out[3]["client-3"] == "no answer within 20 s"
    for number, names in enumerate(left_out):
        for name, why in names.items():
            assert f"round {number}: {name} is left out: {why}" in said
    expected = by_hand([[0, 2, 3], [0, 1], [0, 1]], **QUICK)
    assert same(result(output), expected)


def test_a_killed_server_goes_on_from_its_last_round_over_tls(tmp_path: Path) -> None:
    one_thread()
    tls = certificates(tmp_path)
    address, output = free_address(), tmp_path / "run"
    options = QUICK | {"clients": 2, "rounds": 4, "address": address, "output": output}
    clients = [start("client", number=k, tls_ca=tls["tls_ca"], **options) for k in range(2)]
    first = start("server", **options, **tls)
    try:
        deadline = time.monotonic() + 120
        while not (output / "history.json").exists() or last_round(output) < 2:
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        stopped_at = last_round(output)
        assert stopped_at < 4
        said = said_by(start("server", **options, **tls))
        for client in clients:
            said_by(client, 30)
    finally:
        for process in (first, *clients):
            process.kill()
    assert f"going on behind round {stopped_at}" in said
    assert "accuracy by round" in said
    assert last_round(output) == 4
    taking_part = {key: value for key, value in QUICK.items() if key not in ("clients", "rounds")}
    assert same(result(output), by_hand([[0, 1]] * 4, clients=2, rounds=4, **taking_part))


def last_round(folder: Path) -> int:
    return int(json.loads((folder / "history.json").read_text())["rounds"][-1]["number"])
