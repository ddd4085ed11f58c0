"""What PyTorch's own test suite asks of an optimizer's state dict, hooks and copies, asked of
HinaAdamW (see `test_torch_suite.py`)."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import CASES, drawn, each_backend, each_case, follow, hina, named, parameters, same
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

ignore_missing_names = pytest.mark.filterwarnings(
    "ignore:The optimizer was given no parameter names"
)
Params = list[nn.Parameter]


def make(backend: str, options: dict[str, Any], names: bool = True) -> tuple[Any, Params]:
    params = parameters(*drawn((20, 30), (7,), (3, 2, 2)))
    return hina(named(*params) if names else params, backend, **options), params


def stepped(backend: str, options: dict[str, Any], names: bool = True) -> tuple[Any, Params]:
    optimizer, params = make(backend, options, names)
    follow([optimizer], params)
    return optimizer, params


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def go_on_alike(one: tuple[Any, Params], other: tuple[Any, Params]) -> bool:
    """Whether two optimizers and their parameters stay equal to the last bit."""
    ends = [follow([optimizer], params) for optimizer, params in (one, other)]
    states = [without_names(optimizer.state_dict()) for optimizer, _ in (one, other)]
    return same(*ends) and same(*states)


@each_backend
@each_case
@ignore_missing_names
@pytest.mark.parametrize("saved_with_names", [True, False])
def test_a_state_dict_goes_on_alike_with_new_parameters(backend, options, saved_with_names):
    """With the names missing on one side too, or on both."""
    first, params = stepped(backend, options, saved_with_names)
    saved = copy.deepcopy(first.state_dict())
    kept = copy.deepcopy(saved)
    # Without names the noise of 8-bit rounding goes by position, so these go on by themselves.
    float32 = options.get("optim_bits") == 32
    for names in (True, False) if float32 else (saved_with_names,):
        first, params = stepped(backend, options, saved_with_names)
        second, copies = make(backend, options, names)
        for p, value in zip(copies, params, strict=True):
            p.data.copy_(value.detach())
        second.load_state_dict(saved)
        if names:
            assert second.param_groups[0]["param_names"] == ["p0", "p1", "p2"]
        assert go_on_alike((first, params), (second, copies))
        assert same(saved, kept)  # neither loading nor going on changes what was given


@each_backend
@each_case
def test_a_state_dict_is_of_pytorchs_form(backend, options):
    optimizer, params = stepped(backend, options)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert saved["state"].keys() == {0, 1, 2}
    assert all(len(own) > 0 for own in saved["state"].values())
    (group,) = saved["param_groups"]
    assert group["params"] == [0, 1, 2]
    assert {"lr", "betas", "eps", "weight_decay", "param_names"} <= group.keys()
    assert set(optimizer.state) == set(params)
    # A group that occurs twice is written alike both times, with the same indices.
    optimizer.param_groups.extend(optimizer.param_groups)
    twice = optimizer.state_dict()["param_groups"]
    assert same(twice[0], group)
    assert same(twice[1], group)


@each_backend
@each_case
@ignore_missing_names
@pytest.mark.parametrize("names", [True, False])
def test_a_saved_file_is_equal(backend, options, names):
    optimizer, _ = stepped(backend, options, names)
    saved, file = optimizer.state_dict(), io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), saved)


@each_backend
@each_case
def test_an_older_state_dict_is_loaded(backend, options):
    """One whose groups lack options, or whose steps are tensors, as PyTorch's are."""
    (optimizer, params), twin = stepped(backend, options), stepped(backend, options)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in ("eps", "weight_decay"):
            del group[key]
    for own in saved["state"].values():
        own["step"] = torch.tensor(float(own["step"]))
    optimizer.load_state_dict(saved)
    assert go_on_alike((optimizer, params), twin)


@each_backend
@ignore_missing_names
def test_a_state_dict_of_other_groups_is_refused(backend):
    optimizer, _ = stepped(backend, {}, names=False)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    more = {**saved, "param_groups": [*saved["param_groups"], saved["param_groups"][0]]}
    fewer = copy.deepcopy(saved)
    fewer["param_groups"][0]["params"].pop()
    for wrong in (more, fewer):
        with pytest.raises(ValueError, match="group"):
            optimizer.load_state_dict(wrong)
        assert same(optimizer.state_dict(), before)


@each_backend
@each_case
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_goes_on_alike(backend, options, copied):
    optimizer, params = stepped(backend, options)
    twin = copied(optimizer)
    assert twin.param_groups[0]["params"][0] is not params[0]
    public = [{key for key in vars(o) if not key.startswith("_")} for o in (optimizer, twin)]
    assert public[0] == public[1]
    assert go_on_alike((optimizer, params), (twin, twin.param_groups[0]["params"]))


@each_backend
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_loads_a_state_dict_and_takes_groups(backend, copied):
    optimizer, params = stepped(backend, {})
    twin = copied(optimizer)
    (late,) = parameters(*drawn((5,)))
    twin.load_state_dict(optimizer.state_dict())
    copies = list(twin.param_groups[0]["params"])
    assert go_on_alike((optimizer, params), (twin, copies))
    twin.add_param_group({"params": [("late", late)]})
    assert twin.param_groups[1].keys() == optimizer.param_groups[0].keys()


@each_backend
def test_state_that_belongs_to_no_parameter_is_kept(backend):
    """PyTorch copies it as it is."""
    optimizer, params = stepped(backend, {})
    optimizer.state["note"] = {"epoch": 3}
    saved = copy.deepcopy(optimizer.state_dict())
    fresh, _ = make(backend, {})
    fresh.load_state_dict(saved)
    assert fresh.state["note"] == {"epoch": 3}
    follow([fresh], params)


@each_backend
@each_case
def test_it_can_be_printed(backend, options):
    optimizer, _ = make(backend, options)
    shown = repr(optimizer)
    assert shown.startswith(f"{type(optimizer).__name__} (\nParameter Group 0\n")
    assert f"lr: {options.get('lr', 0.001)}" in shown


@each_backend
def test_state_dict_hooks_run_in_their_order(backend):
    optimizer, _ = stepped(backend, {})
    seen: list[str] = []

    def note(text: str) -> Callable[..., None]:
        return lambda *_: seen.append(text)

    optimizer.register_state_dict_pre_hook(note("before 2"))
    optimizer.register_state_dict_pre_hook(note("before 1"), prepend=True)
    optimizer.register_state_dict_post_hook(note("after 2"))
    optimizer.register_state_dict_post_hook(note("after 1"), prepend=True)
    handle = optimizer.register_state_dict_post_hook(note("after 3"))
    optimizer.state_dict()
    handle.remove()
    optimizer.state_dict()
    order = ["before 1", "before 2", "after 1", "after 2"]
    assert seen == [*order, "after 3", *order]


@each_backend
def test_a_state_dict_hook_may_change_or_replace_the_state_dict(backend):
    optimizer, _ = stepped(backend, {})
    optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("note", 1))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "version": 2})
    saved = optimizer.state_dict()
    assert saved["state"]["note"] == 1
    assert saved["version"] == 2


@each_backend
def test_a_state_dict_hook_may_return_another_form(backend):
    optimizer, _ = stepped(backend, {})
    optimizer.register_state_dict_post_hook(lambda o, saved: {"inner": saved})
    assert optimizer.state_dict().keys() == {"inner"}


@each_backend
@each_case
def test_load_state_dict_hooks_run_in_their_order_and_may_change_it(backend, options):
    optimizer, _ = stepped(backend, options)
    seen: list[Any] = []

    def replace(o: Any, saved: dict[str, Any]) -> dict[str, Any]:
        other = copy.deepcopy(saved)
        other["param_groups"][0]["lr"] = 0.003
        return other

    def change(o: Any, saved: dict[str, Any]) -> None:
        seen.append(saved["param_groups"][0]["lr"])
        saved["param_groups"] = [{**saved["param_groups"][0], "lr": 0.002}]

    optimizer.register_load_state_dict_pre_hook(change)
    optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    saved = optimizer.state_dict()
    lr = saved["param_groups"][0]["lr"]
    optimizer.load_state_dict(saved)
    assert seen == [0.003, 0.002]
    assert saved["param_groups"][0]["lr"] == lr


@each_backend
@each_case
def test_step_hooks_run_in_their_order(backend, options):
    optimizer, params = make(backend, options)
    seen: list[str] = []

    def note(text: str) -> Callable[..., None]:
        return lambda *_: seen.append(text)

    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all after")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    try:
        follow([optimizer], params, 2)
    finally:
        for handle in handles:
            handle.remove()
    follow([optimizer], params, 1)
    assert seen == ["all before", "before", "after", "all after"] * 2


@each_backend
def test_a_step_hook_sees_gradients_before_and_parameters_after(backend):
    """Before a step it may still change gradients and arguments."""
    (optimizer, params), (plain, twins) = make(backend, {"lr": 0.1}), make(backend, {"lr": 0.1})
    seen: list[Any] = []

    def double(o: Any, args: Any, kwargs: Any) -> Any:
        for p in params:
            p.grad *= 2
        return (o, lambda: "a loss"), {}

    optimizer.register_step_pre_hook(double)
    optimizer.register_step_post_hook(
        lambda o, *_: seen.append([p.detach().clone() for p in params])
    )
    for seed in range(3):
        grads = drawn(*(tuple(p.shape) for p in params), seed=seed)
        for p, twin, grad in zip(params, twins, grads, strict=True):
            p.grad, twin.grad = grad, 2 * grad
        assert optimizer.step() == "a loss"
        plain.step()
    assert same(seen[-1], [p.detach() for p in twins])
    assert not same(seen[0], seen[-1])


@each_backend
@pytest.mark.parametrize("case", ["defaults", "8-bit state", "nothing on"])
@pytest.mark.parametrize("flat", [True, False])
def test_distributed_checkpoints_take_and_give_its_state(backend, case, flat):
    """They ask by parameter name, and make an optimizer step once to see what state it has."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    how = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)

    def run() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Linear(40, 30)
        return model, hina(model.named_parameters(), backend, **CASES[case])

    (model, optimizer), (other, fresh) = run(), run()
    follow([optimizer], list(model.parameters()))
    other.load_state_dict(model.state_dict())
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=how)
    dcp.set_optimizer_state_dict(other, fresh, saved, options=how)
    params, others = list(model.parameters()), list(other.parameters())
    assert go_on_alike((optimizer, params), (fresh, others))
