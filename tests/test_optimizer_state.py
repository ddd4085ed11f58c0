"""What an optimizer remembers: continued bit for bit, by name, converted, copied."""

import copy
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.optim import state
from library.optim.layout import BLOCK, layout_of

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def make_parameters() -> dict[str, nn.Parameter]:
    """All state formats: 8-bit and float32, zero and initial anchors, float32 and bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x.lokr_w1": (4, 4),
        "x.lokr_w2": (30, 20),
        "y.lora_down.weight": (4, 90),
        "y.lora_up.weight": (70, 4),
        "plain.weight": (20, 17),
        "plain.bias": (17,),
    }
    params = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    params["plain.weight"] = nn.Parameter(params["plain.weight"].detach().bfloat16())
    return params


def make_optimizer(params: dict[str, nn.Parameter], **options) -> HinaAdamWOptimizer:
    return HinaAdamWOptimizer(params.items(), lr=1e-2, min_8bit_size=300, **options)


def as_group(params: dict[str, nn.Parameter]) -> dict[str, Any]:
    """A parameter group with names, as PyTorch before 2.6 takes it too."""
    return {"params": list(params.values()), "param_names": list(params)}


def train(optimizer: HinaAdamWOptimizer, params: dict[str, nn.Parameter], steps: range) -> None:
    """Gradients that depend on the parameters, so that an error would grow, and on the step."""
    for step in steps:
        for index, p in enumerate(params.values()):
            noise = torch.Generator().manual_seed(1000 * step + index)
            p.grad = (0.1 * p.detach().float() + torch.randn(p.shape, generator=noise)).to(p.dtype)
        params["plain.bias"].grad = None if step % 3 == 0 else params["plain.bias"].grad
        optimizer.step()


def values(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def straight_run(steps: int = 8) -> dict[str, Tensor]:
    params = make_parameters()
    train(make_optimizer(params), params, range(steps))
    return values(params)


def test_another_process_continues_bit_for_bit(tmp_path):
    params = make_parameters()
    optimizer = make_optimizer(params)
    train(optimizer, params, range(4))
    torch.save(
        {"params": values(params), "optimizer": optimizer.state_dict()}, tmp_path / "half.pt"
    )
    script = (
        "import sys, torch, test_optimizer_state as t\n"
        "half = torch.load(sys.argv[1] + '/half.pt', weights_only=True)\n"
        "params = t.make_parameters()\n"
        "for name, p in params.items(): p.data.copy_(half['params'][name])\n"
        "optimizer = t.make_optimizer(params)\n"
        "optimizer.load_state_dict(half['optimizer'])\n"
        "t.train(optimizer, params, range(4, 8))\n"
        "torch.save(t.values(params), sys.argv[1] + '/end.pt')\n"
    )
    paths = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=paths)
    assert equal(torch.load(tmp_path / "end.pt", weights_only=True), straight_run())


def test_other_groups_continue_bit_for_bit_by_name(caplog):
    caplog.set_level(logging.INFO)
    params = make_parameters()
    first = make_optimizer(params)
    train(first, params, range(4))
    saved = first.state_dict()
    names = list(params)
    order = [names[i] for i in (3, 0, 5, 1, 4, 2)]
    groups = [
        {"params": [params[name] for name in some], "named": some}
        for some in (order[:1], order[1:4], order[4:])
    ]
    second = HinaAdamWOptimizer(groups, lr=1e-2, min_8bit_size=300)
    second.load_state_dict(saved)
    assert "found by parameter name" in caplog.text
    train(second, params, range(4, 8))
    assert equal(values(params), straight_run())


def test_grouping_changes_no_bit():
    params = make_parameters()
    names = list(params)
    groups = [
        {"params": [params[name] for name in some], "named": some}
        for some in (names[3:], names[:1], names[1:3])
    ]
    train(HinaAdamWOptimizer(groups, lr=1e-2, min_8bit_size=300), params, range(8))
    assert equal(values(params), straight_run())


def test_without_names_the_order_counts():
    params = make_parameters()
    with pytest.warns(UserWarning, match="no parameter names"):
        first = HinaAdamWOptimizer(params.values(), lr=1e-2, min_8bit_size=300)
    train(first, params, range(4))
    halfway = values(params)
    saved = copy.deepcopy(first.state_dict())
    train(first, params, range(4, 8))
    straight = values(params)
    for name, p in params.items():
        p.data.copy_(halfway[name])
    with pytest.warns(UserWarning, match="no parameter names"):
        second = HinaAdamWOptimizer(params.values(), lr=1e-2, min_8bit_size=300)
    with pytest.warns(UserWarning, match="no parameter names"):
        other = HinaAdamWOptimizer([{"params": [p]} for p in params.values()])
    second.load_state_dict(saved)
    train(second, params, range(4, 8))
    assert equal(values(params), straight)
    with pytest.raises(ValueError, match="groups of sizes"):
        other.load_state_dict(saved)


def stepped(*groups: list[tuple[str, int]]) -> HinaAdamWOptimizer:
    """An optimizer whose parameters, called as told, have stepped with gradients as told."""
    some = []
    for group in groups:
        params = [nn.Parameter(torch.ones(3)) for _ in group]
        for p, (_, gradient) in zip(params, group, strict=True):
            p.grad = torch.full_like(p, gradient)
        some.append({"params": params, "named": [name for name, _ in group]})
    optimizer = HinaAdamWOptimizer(some, use_agr=False)
    optimizer.step()
    return optimizer


def gradients_seen(optimizer: HinaAdamWOptimizer) -> list[float]:
    """Of each parameter, the gradient that its state is from."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p]["exp_avg_sq"][0].item() ** 0.5 for p in params]


def test_one_parameter_without_name_does_not_hide_the_names_of_others():
    saved = stepped([("a", 1)], [("b", 2), ("", 3)], [("", 4)]).state_dict()
    assert gradients_seen(stepped([("a", 1)], [("b", 2), ("", 3)], [("", 4)])) == [1, 2, 3, 4]
    other = stepped([("b", 9), ("", 9)], [("a", 9)], [("", 9)])
    other.load_state_dict(saved)
    assert gradients_seen(other) == [2, 3, 1, 4]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "c", ""], r"Not in it: c\. Only in it: b\."),
        (["a", ""], "groups of sizes"),
        (["", "b", "a", "c"], "groups of sizes"),
    ],
)
def test_names_that_contradict_are_refused(names, message):
    saved = stepped([("a", 1), ("b", 2), ("", 3)]).state_dict()
    other = stepped([(name, 9) for name in names])
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert set(gradients_seen(other)) == {9}


def test_names_given_later_are_matched_with_those_that_were_missing():
    saved = stepped([("a", 1), ("b", 2), ("", 3)]).state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    moved, same = stepped([("b", 9), ("c", 9), ("a", 9)]), stepped([("a", 9), ("b", 9), ("c", 9)])
    for other in (moved, same):
        other.load_state_dict(saved)
    assert gradients_seen(moved) == [2, 3, 1]
    assert gradients_seen(same) == [1, 2, 3]
    assert [other.param_groups[0]["lr"] for other in (moved, same)] == [1e-3, 0.5]


def test_a_name_that_occurs_twice_is_matched_in_order():
    saved = stepped([("a", 1), ("a", 2), ("b", 3)]).state_dict()
    other = stepped([("b", 9), ("a", 9), ("a", 9)])
    other.load_state_dict(saved)
    assert gradients_seen(other) == [3, 1, 2]


def test_options_of_the_same_groups_are_taken_over():
    params = make_parameters()
    first = make_optimizer(params)
    first.param_groups[0].update(lr=0.5, initial_lr=1.0)
    second = make_optimizer(params)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.5
    assert second.param_groups[0]["initial_lr"] == 1.0
    assert [id(p) for p in second.param_groups[0]["params"]] == [id(p) for p in params.values()]


def test_impossible_options_are_refused_and_change_nothing():
    params = make_parameters()
    saved = torch.optim.AdamW([as_group(params)], eps=0).state_dict()
    optimizer = make_optimizer(params)
    train(optimizer, params, range(1))
    with pytest.raises(ValueError, match="saved state for HinaAdamWOptimizer: eps=0 is not"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["eps"] == 1e-8
    assert optimizer.state[params["x.lokr_w1"]]["step"] == 1


def test_other_parameters_or_shapes_are_refused():
    params = make_parameters()
    optimizer = make_optimizer(params)
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    renamed = {name.replace("plain.bias", "fancy.bias"): p for name, p in params.items()}
    with pytest.raises(ValueError, match=r"Not in it: fancy\.bias\. Only in it: plain\.bias"):
        make_optimizer(renamed).load_state_dict(saved)
    resized = {**params, "x.lokr_w1": nn.Parameter(torch.zeros(5, 4))}
    with pytest.raises(ValueError, match=r"x\.lokr_w1 has shape \(4, 4\), the parameter \(5, 4\)"):
        make_optimizer(resized).load_state_dict(saved)


@pytest.mark.parametrize(("before", "after"), [(8, 32), (32, 8)])
def test_precision_converts_with_a_log_line(before, after, caplog):
    caplog.set_level(logging.INFO)
    params = make_parameters()
    first = make_optimizer(params, optim_bits=before)
    train(first, params, range(20))
    second = make_optimizer(params, optim_bits=after)
    second.load_state_dict(first.state_dict())
    assert "optimizer state of 3 tensors" in caplog.text
    large = params["x.lokr_w2"]
    moment = {}
    for optimizer in (first, second):
        kept = dict(optimizer.state[large])
        assert ("exp_avg_scale" in kept) == optimizer.uses_8bit(large)
        for name, kind in (("exp_avg", "signed"), ("exp_avg_sq", "positive")):
            coded = optimizer.uses_8bit(large)
            dtype = torch.int32 if coded else torch.float32
            matrix = layout_of((large.numel(),), CPU).gather([kept[name]], dtype)
            if coded:
                matrix = state.decode(matrix, kept[f"{name}_scale"][:, None], kind)
            moment[name, optimizer] = matrix
    for name in ("exp_avg", "exp_avg_sq"):
        one, other = moment[name, first], moment[name, second]
        assert ((one - other).abs() <= 0.07 * one.abs() + 1e-5 * one.abs().max()).all()
    train(second, params, range(20, 22))


def test_loading_copies():
    params = make_parameters()
    first = make_optimizer(params)
    train(first, params, range(2))
    saved = first.state_dict()
    second = make_optimizer(params)
    second.load_state_dict(saved)
    for p in params.values():
        for name, value in second.state[p].items():
            if isinstance(value, Tensor):
                assert value.data_ptr() != first.state[p][name].data_ptr()


def test_state_of_torch_adamw_is_taken_over():
    params = make_parameters()
    adamw = torch.optim.AdamW([as_group(params)], lr=1e-2)
    train(adamw, params, range(3))
    optimizer = make_optimizer(params, optim_bits=32, use_adopt_stability=False)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.state[params["x.lokr_w1"]]["step"] == 3
    assert optimizer.state[params["plain.weight"]]["exp_avg"].dtype == torch.float32
    train(optimizer, params, range(3, 5))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_copies_go_their_own_way_alike(clone):
    params = make_parameters()
    optimizer = make_optimizer(params, nonfinite="skip")
    train(optimizer, params, range(3))
    twin = clone(optimizer)
    twin_params = dict(zip(params, twin.param_groups[0]["params"], strict=True))
    assert all(twin_params[name] is not p for name, p in params.items())
    assert twin.get_optimization_info() == optimizer.get_optimization_info()
    train(optimizer, params, range(3, 6))
    train(twin, twin_params, range(3, 6))
    assert equal(values(twin_params), values(params))


def test_hooks_of_torch_run():
    params = make_parameters()
    optimizer, seen = make_optimizer(params), []
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, range(1))
    assert seen == ["before", "after", "step"]


sizes = st.lists(st.integers(1, 700), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_layout_gathers_splits_and_sums(some):
    tensors = [torch.arange(size, dtype=torch.float32) + size for size in some]
    layout = layout_of(tuple(some), CPU)
    matrix = layout.gather(tensors, torch.float32)
    assert matrix.shape == (sum(-(-size // BLOCK) for size in some), BLOCK)
    pieces = layout.split(matrix, [tensor.shape for tensor in tensors])
    assert all(map(torch.equal, pieces, tensors))
    sums = layout.sum(matrix)
    assert sums.tolist() == pytest.approx([tensor.sum().item() for tensor in tensors], rel=1e-6)
    ends = [torch.arange(-(-size // BLOCK)) for size in some]
    assert layout.block.tolist() == torch.cat(ends).tolist()


def test_sums_of_large_tensors_are_exact_to_float32():
    x = torch.full((3_000_000,), 0.1)
    layout = layout_of((x.numel(),), CPU)
    total = layout.sum(layout.gather([x], torch.float32))
    assert total.item() == pytest.approx(x.double().sum().item(), rel=3e-7)
