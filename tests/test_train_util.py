"""Stock's names, as programs that import its modules call them."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, environment, write_dataset
from safetensors import safe_open
from torch import nn

import train_network
from library import train_util
from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.train_util import (
    get_optimizer,
    get_optimizer_train_eval_fn,
    get_scheduler_fix,
    is_schedulefree_optimizer,
)
from library.training.errors import UserError

STOCKS_PARAMETERS = {
    "get_optimizer": ["args", "trainable_params"],
    "get_scheduler_fix": ["args", "optimizer", "num_processes"],
    "get_optimizer_train_eval_fn": ["optimizer", "args"],
    "is_schedulefree_optimizer": ["optimizer", "args"],
}


def parsed(*words: str) -> argparse.Namespace:
    return train_network.setup_parser().parse_args(words)


def parameter() -> nn.Parameter:
    tensor = nn.Parameter(torch.tensor([1.5, 1.5]))
    tensor.param_name = "x.bias"
    return tensor


@pytest.mark.parametrize("name", STOCKS_PARAMETERS)
def test_functions_take_what_stocks_take(name):
    assert list(inspect.signature(getattr(train_util, name)).parameters) == STOCKS_PARAMETERS[name]


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ([], "torch.optim.adamw.AdamW"),
        (["--optimizer_type", ""], "torch.optim.adamw.AdamW"),
        (["--use_8bit_adam"], "bitsandbytes.optim.adamw.AdamW8bit"),
        (["--use_lion_optimizer"], "lion_pytorch.lion_pytorch.Lion"),
        (
            ["--optimizer_type", "hinaadamw"],
            "library.custom_hina_adamw_optimizer.HinaAdamWOptimizer",
        ),
    ],
)
def test_every_way_to_choose_an_optimizer(words, path):
    if not path.startswith(("torch", "library")):
        pytest.importorskip(path.split(".")[0])
    class_path, text, optimizer = get_optimizer(parsed(*words), [parameter()])
    assert (class_path, text) == (path, "")
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_arguments_reach_the_optimizer():
    args = parsed("--learning_rate", "0.5", "--optimizer_args", "weight_decay=0.1", "betas=0.5,0.9")
    _, text, optimizer = get_optimizer(args, [parameter()])
    assert text == "weight_decay=0.1,betas=(0.5, 0.9)"
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.1, (0.5, 0.9))


def test_parameters_may_come_in_any_form():
    layer = nn.Linear(3, 2)
    _, _, optimizer = get_optimizer(parsed(), layer.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 2
    args = parsed("--optimizer_type", "HinaAdamW", "--learning_rate", "0.5")
    groups = ({"params": [p], "named": [name], "lr": 0.1} for name, p in layer.named_parameters())
    _, _, optimizer = get_optimizer(args, groups)
    assert isinstance(optimizer, HinaAdamWOptimizer)
    assert list(optimizer.roles.names.values()) == ["weight", "bias"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_a_namespace_may_have_few_options():
    args = argparse.Namespace(optimizer_type=None, learning_rate=0.5, max_train_steps=10)
    class_path, _, optimizer = get_optimizer(args, [parameter()])
    assert class_path == "torch.optim.adamw.AdamW"
    args.lr_scheduler = "linear"
    schedule = get_scheduler_fix(args, optimizer, 2)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0.375]  # 5 of 2 · 10 steps
    assert not is_schedulefree_optimizer(optimizer, args)


def test_an_adafactor_that_steps_as_it_likes_brings_its_schedule():
    args = parsed("--optimizer_type", "AdaFactor", "--learning_rate", "0.25", "--unet_lr", "0.1")
    path, text, optimizer = get_optimizer(args, [{"params": [parameter()], "lr": 0.1}])
    assert (path, text) == ("transformers.optimization.Adafactor", "relative_step=True")
    assert args.lr_scheduler == "adafactor:0.25"
    assert args.learning_rate is args.unet_lr is args.text_encoder_lr is None
    schedule = get_scheduler_fix(args, optimizer, 1)
    assert type(schedule).__name__ == "AdafactorSchedule"
    assert schedule.get_last_lr() == [0.25]


def test_an_adafactor_with_a_learning_rate_leaves_the_options_alone():
    args = parsed("--optimizer_type", "AdaFactor", "--optimizer_args", "relative_step=False")
    before = dict(vars(args))
    _, _, optimizer = get_optimizer(args, [{"params": [parameter()], "lr": 0.1}])
    assert vars(args) == before
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_all_that_is_wrong_is_told_at_once():
    words = ["--use_8bit_adam", "--optimizer_type", "Lyon", "--optimizer_args", "weight_decay"]
    with pytest.raises(UserError) as error:
        get_optimizer(parsed(*words), [parameter()])
    both, name, argument = error.value.problems
    assert both.startswith("--use_8bit_adam and --optimizer_type choose different optimizers")
    assert "Did you mean 'Lion'" in name
    assert "key=value" in argument


def test_schedule_free_optimizers_are_told_train_from_eval():
    pytest.importorskip("schedulefree")
    args = parsed("--optimizer_type", "AdamWScheduleFree", "--learning_rate", "0.5")
    _, _, optimizer = get_optimizer(args, [parameter()])
    (group,) = optimizer.param_groups
    assert group["train_mode"]
    assert is_schedulefree_optimizer(optimizer, args)
    train, evaluate = get_optimizer_train_eval_fn(optimizer, args)
    evaluate()
    assert not group["train_mode"]
    train()
    assert group["train_mode"]
    assert get_scheduler_fix(args, optimizer, 1).get_last_lr() == [0.5]


def test_other_optimizers_have_nothing_to_be_told():
    args = parsed()
    _, _, optimizer = get_optimizer(args, [parameter()])
    for tell in get_optimizer_train_eval_fn(optimizer, args):
        tell()


PROGRAM = """
import sys

sys.path.insert(0, {root!r})
from train_network import NetworkTrainer, setup_parser

args = setup_parser().parse_args(sys.argv[1:])
args.output_name = "from-a-program"
NetworkTrainer().train(args)
"""


@pytest.mark.slow
def test_another_program_trains_the_model_that_ships(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    options = {
        "pretrained_model_name_or_path": ROOT / "assets" / "base_model",
        "dataset_config": write_dataset(tmp_path, pictures=2),
        "network_module": "networks.lokr",
        "optimizer_type": "HinaAdamW",
        "network_dim": 2,
        "max_train_steps": 2,
        "seed": 1,
        "output_dir": tmp_path / "out",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    finished = subprocess.run(
        [sys.executable, program, *words],
        cwd=tmp_path,  # not the project's folder
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    with safe_open(tmp_path / "out" / "from-a-program.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == "2"
        learnt = [file.get_tensor(name) for name in file.keys() if "lokr_w2_b" in name]  # noqa: SIM118
    assert max(tensor.abs().max() for tensor in learnt) > 0  # they start at zero
