"""What a parameter group may set of its own, what it may not, and which numbers are taken."""

import numpy as np
import pytest
import torch
from torch import nn

from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.optim.arguments import OptimizerArgumentError


def group(name: str = "x.weight", **options) -> dict:
    return {"params": [nn.Parameter(torch.ones(3))], "named": [name], **options}


@pytest.mark.parametrize(
    "option", [{"use_agr": False}, {"optim_bits": 32}, {"spd_lambda": 0.1}, {"nonfinite": "skip"}]
)
def test_a_group_cannot_set_what_acts_on_all(option):
    (key,) = option
    words = (
        rf"'{key}' .*parameter group.*lr, betas, eps, weight_decay.*HinaAdamWOptimizer\(.*{key}="
    )
    with pytest.raises(OptimizerArgumentError, match=words):
        HinaAdamWOptimizer([group("x.weight"), group("y.weight", **option)])
    optimizer = HinaAdamWOptimizer([group()])
    with pytest.raises(OptimizerArgumentError, match=words):
        optimizer.add_param_group(group("y.weight", **option))
    assert len(optimizer.param_groups) == 1


def test_what_a_group_sets_acts_on_it_alone():
    """And what is not the optimizer's at all is the caller's own business."""
    own = {"lr": 0.5, "betas": (0.0, 0.5), "eps": 0.1, "weight_decay": 0.2}
    for key, value in own.items():
        groups = [group("x.weight"), group("y.weight", **{key: value}, label="mine")]
        optimizer = HinaAdamWOptimizer(groups, use_spd=False, use_grams=False)
        params = [g["params"][0] for g in optimizer.param_groups]
        for step in range(1, 4):
            for p in params:
                p.grad = torch.full((3,), 0.01 * step)
            optimizer.step()
        assert not torch.equal(*params), key
        assert optimizer.param_groups[1]["label"] == "mine"


@pytest.mark.parametrize(
    "number", [np.float32, np.float64, torch.tensor, lambda value: torch.tensor([value])]
)
def test_numbers_of_numpy_and_tensors_become_plain_ones(number):
    """So that the state loads with weights_only, and a step never reads a device for them."""
    own = {"betas": [number(0.5), number(0.25)], "weight_decay": number(0.125), "lr": number(0.5)}
    args = {**own, "tam_beta": number(0.5), "min_8bit_size": np.int64(64)}
    optimizer = HinaAdamWOptimizer([group("x.weight"), group("y.weight", lr=number(0.25))], **args)
    for some, lr in zip(optimizer.param_groups, (0.5, 0.25), strict=True):
        kept = {key: some[key] for key in own}
        assert kept == {"betas": (0.5, 0.25), "weight_decay": 0.125, "lr": lr}
        assert {type(value) for value in (*kept["betas"], kept["weight_decay"], kept["lr"])} == {
            float
        }
    assert type(optimizer.min_8bit_size) is int


def test_a_tensor_learning_rate_is_read_once():
    lr = torch.tensor(0.5)
    optimizer = HinaAdamWOptimizer([group()], lr=lr)
    lr.fill_(0.25)
    assert optimizer.param_groups[0]["lr"] == 0.5
    saved = torch.optim.AdamW([group()], lr=lr).state_dict()
    optimizer = HinaAdamWOptimizer([group()])
    optimizer.load_state_dict(saved)
    assert type(optimizer.param_groups[0]["lr"]) is float


@pytest.mark.parametrize(
    "lr", [torch.tensor([0.1, 0.2]), torch.tensor(True), torch.tensor(1j), torch.tensor(torch.nan)]
)
def test_tensors_that_are_no_number_are_refused(lr):
    with pytest.raises(OptimizerArgumentError, match=r"lr=.*; lr must be a finite number >= 0"):
        HinaAdamWOptimizer([group()], lr=lr)
