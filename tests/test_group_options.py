"""What a parameter group may set of its own, and what it may not."""

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
