"""Several processes train one adapter: bit-identical weights, and the loss of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, environment, run_twice, same_weights, train, words, write_dataset
from safetensors.torch import load_file

from library.training.cpu_processes import processes_asked_for

pytestmark = pytest.mark.slow

# A second process writes its own weights beside the first one's, which only a test wants to see.
WRITES_EVERY_RANK = """
import os, sys
import train_network
from library.training.checkpoints import Checkpoints

at_end = Checkpoints.at_end

def at_end_of_every_rank(self, step, epoch):
    self.is_main = True
    self.options.output_name = f"rank{os.environ['RANK']}"
    return at_end(self, step, epoch)

Checkpoints.at_end = at_end_of_every_rank
sys.exit(train_network.main())
"""


def launch_two(tmp_path: Path, **options: object) -> None:
    script = tmp_path / "every_rank.py"
    script.write_text(WRITES_EVERY_RANK)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    finished = subprocess.run(
        [*launch, str(script), *words(**options)],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]


def losses(state: Path) -> list[float]:
    history = json.loads((state / "progress.json").read_text())["history"]
    values: list[float] = history["series"]["loss/current"]["values"]
    return values


def test_two_processes_end_with_the_same_weights_and_the_losses_of_one(tmp_path: Path) -> None:
    options = {"max_train_steps": 8, "save_state_on_train_end": True, "learning_rate": 1e-4}
    pair, alone = tmp_path / "pair", tmp_path / "alone"
    one_each = write_dataset(tmp_path / "a", batch_size=1, pictures=8)
    both = write_dataset(tmp_path / "b", batch_size=2, pictures=8)
    launch_two(tmp_path, dataset_config=one_each, output_dir=pair, **options)
    train(dataset_config=both, output_dir=alone, output_name="one", **options)
    assert same_weights(pair / "rank0.safetensors", pair / "rank1.safetensors")
    trained = load_file(pair / "rank0.safetensors")
    assert any(value.any() for name, value in trained.items() if "lora_up" in name)
    assert losses(pair / "rank0-state") == pytest.approx(losses(alone / "one-state"), rel=1e-5)


def test_gradients_are_averaged_also_where_a_process_has_none(tmp_path: Path) -> None:
    script = tmp_path / "gradients.py"
    script.write_text(
        """
import torch
from accelerate import Accelerator
from library.training.processes import average_gradients

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
both, one, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
half = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
both.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
half.grad = torch.ones(3, dtype=torch.bfloat16) * rank
if rank == 1:
    one.grad = torch.tensor([4.0, -4.0])
average_gradients([both, one, none, half], accelerator)
assert both.grad.tolist() == [1.5, 3.0], both.grad
assert one.grad.tolist() == [2.0, -2.0], one.grad
assert none.grad is None
assert half.grad.dtype == torch.bfloat16 and half.grad.tolist() == [0.5] * 3, half.grad
accelerator.end_training()  # as the trainer does: without it gloo may abort the interpreter's exit
"""
    )
    run_twice(script)


@pytest.mark.parametrize(("seed", "minutes"), [(None, 7), (1, 10)])
def test_processes_on_cpus_join_with_and_without_a_seed(
    tmp_path: Path, seed: int | None, minutes: int
) -> None:
    script = tmp_path / "timeout.py"
    script.write_text(
        f"""
from datetime import timedelta
import torch
from library.training.accelerator import make_accelerator, shared_seed
from library.training.options import Options
from library.training.processes import gather

options = Options(ddp_timeout={minutes}, seed={seed})
seed = shared_seed(options)
accelerator = make_accelerator(options)
assert accelerator.num_processes == 2
assert gather(seed, accelerator) == [seed, seed]

def waits():  # a name that held the group would keep gloo's threads alive into the exit: an abort
    return torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout

assert waits() == timedelta(minutes={minutes}), waits()
accelerator.end_training()
"""
    )
    run_twice(script, ACCELERATE_USE_CPU="True")


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("accelerate launch --num_processes 2 --cpu train_network.py", 2),
        ("accelerate launch --cpu --num-processes=3 train_network.py", 3),
        ("accelerate launch --cpu train_network.py --network_dim 4", 1),
        ("bash", 1),
        ("", 1),
    ],
)
def test_processes_asked_of_the_launcher(command: str, count: int) -> None:
    assert processes_asked_for(command.split()) == count
