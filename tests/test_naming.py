"""library/optim/naming.py: names for parameter groups, whoever made them."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from library.optim import naming
from library.optim.naming import name_groups


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4, bias=False))


def test_names_by_identity_not_by_order_or_shape() -> None:
    net = network()
    weight, bias, second = net.parameters()
    groups = [{"params": [second, weight], "lr": 1.0}, {"params": [bias], "lr": 2.0}]
    named = name_groups(net, groups)
    assert [group["named"] for group in named] == [["1.weight", "0.weight"], ["0.bias"]]


def test_other_keys_stay_and_the_groups_passed_are_untouched() -> None:
    net = network()
    group = {"params": net[0].parameters(), "lr": 3.0, "weight_decay": 0.1}
    (named,) = name_groups(net, [group])
    assert (named["lr"], named["weight_decay"]) == (3.0, 0.1)
    assert "named" not in group


@pytest.mark.parametrize("kind", ["generator", "dict values", "one tensor", "bare tensors"])
def test_every_form_of_params(kind: str) -> None:
    net = network()
    parameters = dict(net.named_parameters())
    groups = {
        "generator": [{"params": (p for p in net.parameters())}],
        "dict values": [{"params": parameters.values()}],
        "one tensor": [{"params": p} for p in net.parameters()],
        "bare tensors": net.parameters(),
    }[kind]
    named = name_groups(net, groups)
    assert [name for group in named for name in group["named"]] == list(parameters)
    for group in named:
        assert len(group["named"]) == len(group["params"])
    torch.optim.SGD(named, lr=1.0)  # takes them


def test_a_tensor_from_outside_is_named_by_its_place() -> None:
    net = network()
    outside = nn.Parameter(torch.zeros(1))
    named = name_groups(net, [{"params": [net[0].weight]}, {"params": [net[0].bias, outside]}])
    assert named[1]["named"] == ["0.bias", "group1.param1"]


def test_groups_and_tensors_mixed_are_refused() -> None:
    net = network()
    with pytest.raises(TypeError, match="parameter groups are dicts"):
        name_groups(net, [{"params": [net[0].weight]}, net[0].bias])


def test_imports_nothing_but_the_standard_library_and_torch() -> None:
    tree = ast.parse(Path(naming.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported <= set(sys.stdlib_module_names) | {"torch"}
