"""Relations in an optimizer: partners are found when they are looked for, kept, and act on lr."""

import copy
import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factored_models import Adapter, ConvNet, Transformer, partners_of, train
from optimizers import drawn, each_backend, parameters, same
from torch import nn

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.techniques import relations
from library.optim.techniques.importance import fair_factors, importances
from library.optim.techniques.relations import Relations

LR, INTERVAL = 1e-3, 10
OFF = dict.fromkeys(AdaptiveHinaAdamW.SWITCHES, False)
ALONE: dict[str, Any] = {
    **OFF,
    "use_dynamic_adaptation": True,
    "optim_bits": 32,
    "weight_decay": 0.0,
    "relationship_discovery_interval": INTERVAL,
}


def adaptive(model: nn.Module, named: bool = False, **options: Any) -> AdaptiveHinaAdamW:
    items = model.named_parameters() if named else model.parameters()
    return AdaptiveHinaAdamW(items, lr=LR, **{**ALONE, **options})


def run(model: nn.Module, optimizer: AdaptiveHinaAdamW, first: int, last: int) -> None:
    """Steps `first` to `last`, counted from 1."""
    for _ in train(model, optimizer, last - first + 1, first):
        pass


def scale(relation: dict[str, Any]) -> float:
    """The factor on lr by spec 1 §4."""
    return (1 + 0.2 * relation["compatibility"]) / (1 + 0.1 * relation["product_norm"])


def effective_lrs(optimizer: AdaptiveHinaAdamW) -> list[float]:
    (record,) = optimizer.last_step
    return record.values["effective_lr"].tolist()


MODELS = {
    "LoRA, rank 4": lambda: Adapter(rank=4),
    "LoRA, rank 16": lambda: Adapter(rank=16),
    "convolutions": lambda: Adapter("conv"),
    "LoKr": lambda: Adapter("lokr"),
}


@each_backend
@pytest.mark.parametrize("named", [False, True], ids=["without names", "with names"])
@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_every_true_pair_is_found_in_a_run(model: Any, named: bool, backend: str):
    """By the defaults, but that partners are looked for sooner."""
    adapter = model()
    optimizer = AdaptiveHinaAdamW(
        adapter.named_parameters() if named else adapter.parameters(),
        lr=LR,
        relationship_discovery_interval=INTERVAL,
        backend=backend,
    )
    run(adapter, optimizer, 1, 2 * INTERVAL)
    found = partners_of(optimizer, adapter)
    assert {name: partner for name, (partner, _) in found.items()} == adapter.partners()
    left = ("lora_up", "lokr_w2_a")
    for name, (_, product) in found.items():
        assert product == ("P·Q" if any(half in name for half in left) else "Q·P")
    told = optimizer.get_relationship_summary()["relationships"]
    assert all(one["compatibility"] > 0.47 for one in told)
    names = [name for name, _ in adapter.named_parameters()]
    for one in told:
        wanted = names[one["partner_index"]] if named else ""
        assert one["partner_name"] == wanted


def test_names_decide_where_gradients_say_nothing():
    up, down = parameters(torch.zeros(30, 4), drawn((4, 20))[0])
    others = parameters(*drawn((4, 20), (30, 4), seed=1))
    params = [
        ("a.lora_up.weight", up),
        ("x", others[0]),
        ("a.lora_down.weight", down),
        ("y", others[1]),
    ]
    optimizer = AdaptiveHinaAdamW(params, lr=LR, **{**ALONE, "relationship_discovery_interval": 2})
    for _ in range(2):
        for _, p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    told = optimizer.get_relationship_summary()["relationships"]
    assert [(one["param_name"], one["partner_name"]) for one in told] == [
        ("a.lora_up.weight", "a.lora_down.weight"),
        ("a.lora_down.weight", "a.lora_up.weight"),
    ]
    assert [one["interaction_type"] for one in told] == ["P·Q", "Q·P"]
    assert {one["compatibility"] for one in told} == {0.7 / 4 + 0.3}


@pytest.mark.parametrize("interval", [1, 4, 7])
def test_partners_are_looked_for_at_every_interval(interval: int, monkeypatch: pytest.MonkeyPatch):
    looked = []
    plain = relations.discover

    def counted(matrices: Any, *others: Any) -> Any:
        looked.append((step, len(matrices)))
        return plain(matrices, *others)

    monkeypatch.setattr(relations, "discover", counted)
    adapter = Adapter(repeats=1)
    optimizer = adaptive(adapter, relationship_discovery_interval=interval)
    for step in range(1, 22):
        run(adapter, optimizer, step, step)
        if step < interval:
            assert optimizer.get_relationship_summary()["total_relationships"] == 0
    assert [step for step, _ in looked] == [*range(interval, 22, interval)]
    # In the first step there is no state yet to note a partner in.
    assert {count for step, count in looked if step > 1} == {6}


@each_backend
def test_the_scale_acts_on_the_parameter(backend: str):
    """Each element's step is that of `torch.optim.AdamW` on the same gradients, times importance's
    factor and the scale of spec 1 §4."""
    adapter = Adapter(rank=4, repeats=2)
    optimizer = adaptive(adapter, backend=backend)
    params = list(adapter.parameters())
    copies = parameters(*params)
    reference = torch.optim.AdamW(copies, lr=LR, weight_decay=0.0)
    for seed in range(3 * INTERVAL):
        optimizer.zero_grad()
        adapter.loss(seed).backward()
        before = [p.detach().clone() for p in params]
        starts = [p.detach().clone() for p in copies]
        overview = optimizer.overview()
        inner = overview.numbers("inner_pace", 1.0)
        shares = fair_factors(importances(overview), 1.0, inner).tolist()
        for own, copied in zip(params, copies, strict=True):
            copied.grad = own.grad
        optimizer.step()
        reference.step()
        entries = [optimizer.state[p].get("relation") for p in params]
        assert all(entries) == (seed + 1 >= INTERVAL)
        scales = [scale(entry) if entry else 1.0 for entry in entries]
        wanted = [LR * share * own for share, own in zip(shares, scales, strict=True)]
        assert effective_lrs(optimizer) == pytest.approx(wanted, rel=1e-9)
        for k, p in enumerate(params):
            step = (copies[k] - starts[k]) * (wanted[k] / LR)
            torch.testing.assert_close(p.detach() - before[k], step, rtol=1e-3, atol=2e-7)
    assert max(scales) > 1.0
    assert min(scales) < max(scales) - 0.02


def test_the_norm_is_that_of_the_product_when_partners_were_looked_for():
    adapter = Adapter(rank=4, repeats=1)
    optimizer = adaptive(adapter)
    run(adapter, optimizer, 1, INTERVAL - 1)
    formed = [
        float(torch.linalg.norm((layer.lora_up.weight @ layer.lora_down.weight).detach()))
        for layer in adapter.layers
        for _ in range(2)
    ]
    run(adapter, optimizer, INTERVAL, INTERVAL + 3)
    told = optimizer.get_relationship_summary()["relationships"]
    assert [one["product_norm"] for one in told] == pytest.approx(formed, rel=1e-5)
    run(adapter, optimizer, INTERVAL + 4, 2 * INTERVAL)
    later = optimizer.get_relationship_summary()["relationships"]
    assert all(
        now["product_norm"] > then["product_norm"] for now, then in zip(later, told, strict=True)
    )


@pytest.mark.parametrize(
    ("pace", "own", "wanted"),
    [(0.1, 0.05, 0.01), (3.0, 1.2, 3.6), (3.0, 2.0, 5.0), (1.0, 0.5, 0.5)],
)
def test_importance_and_relations_together_are_held(pace: float, own: float, wanted: float):
    technique = Relations(100, 0.3)
    work = SimpleNamespace(
        pace=torch.tensor([pace], dtype=torch.float64),
        factors={technique: torch.tensor([own], dtype=torch.float64)},
    )
    technique.apply(work)
    assert work.pace.item() == pytest.approx(wanted)


def test_a_very_large_product_all_but_stops_its_parameters():
    adapter = Adapter(repeats=1)
    optimizer = adaptive(adapter)
    run(adapter, optimizer, 1, INTERVAL)
    first = next(iter(adapter.parameters()))
    optimizer.state[first]["relation"]["product_norm"] = 1e6
    run(adapter, optimizer, INTERVAL + 1, INTERVAL + 1)
    assert effective_lrs(optimizer)[0] == pytest.approx(0.01 * LR, rel=1e-9)
    assert min(effective_lrs(optimizer)[1:]) > 0.05 * LR


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("threshold", "layers"), [(0.47, {0, 1, 2}), (0.48, {1}), (0.66, set())])
def test_only_partners_above_the_threshold(threshold: float, layers: set[int], named: bool):
    """Of the halves of a square layer two products fit, of the others one."""
    adapter = Adapter(repeats=1)
    optimizer = adaptive(adapter, named, compatibility_threshold=threshold)
    run(adapter, optimizer, 1, INTERVAL)
    found = {int(name.split(".")[1]) for name in partners_of(optimizer, adapter)}
    assert found == layers


def test_saved_and_resumed_bit_for_bit():
    adapter = Adapter(repeats=2)
    optimizer = adaptive(adapter)
    run(adapter, optimizer, 1, INTERVAL + 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(adapter)
    resumed = adaptive(twin)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    told = optimizer.get_relationship_summary()
    assert resumed.get_relationship_summary() == told
    assert told["total_relationships"] == 12
    for model, own in ((adapter, optimizer), (twin, resumed)):
        run(model, own, INTERVAL + 4, 2 * INTERVAL + 3)
    assert same(adapter.state_dict(), twin.state_dict())
    assert same(optimizer.state_dict(), resumed.state_dict())
    assert resumed.get_relationship_summary() != told


def test_grouped_otherwise_relations_go_with_the_names():
    adapter = Adapter(repeats=2)
    optimizer = adaptive(adapter, named=True)
    run(adapter, optimizer, 1, INTERVAL)
    items = list(adapter.named_parameters())
    halves = [{"params": items[1::2]}, {"params": items[::2][::-1]}]
    regrouped = AdaptiveHinaAdamW(halves, lr=LR, **ALONE)
    regrouped.load_state_dict(optimizer.state_dict())
    for told in (optimizer, regrouped):
        summary = told.get_relationship_summary()["relationships"]
        found = {one["param_name"]: one["partner_name"] for one in summary}
        assert found == adapter.partners()
        every = [p for group in told.param_groups for p in group["params"]]
        for one in summary:
            assert every[one["partner_index"]] is adapter.get_parameter(one["partner_name"])


def test_names_that_several_have_do_not_tell_a_partner():
    """As of two networks in one optimizer."""
    one, other = Adapter(repeats=1), Adapter(repeats=1)
    torch.manual_seed(1)
    for p in other.parameters():
        nn.init.normal_(p, std=0.1)
    params = [*one.named_parameters(), *other.named_parameters()]
    optimizer = AdaptiveHinaAdamW(params, lr=LR, **ALONE)
    for seed in range(INTERVAL):
        optimizer.zero_grad()
        (one.loss(seed) + other.loss(seed + 100)).backward()
        optimizer.step()
    told = optimizer.get_relationship_summary()["relationships"]
    assert len(told) == 12
    assert {one["param_index"]: one["partner_index"] for one in told} == {
        k: k ^ 1 for k in range(12)
    }


def test_parameters_without_a_gradient_keep_what_was_found():
    adapter = Adapter(repeats=1)
    optimizer = adaptive(adapter)
    run(adapter, optimizer, 1, INTERVAL)
    frozen = adapter.layers[0].lora_up.weight
    frozen.requires_grad_(False)
    before = copy.deepcopy(optimizer.state[frozen]["relation"])
    run(adapter, optimizer, INTERVAL + 1, 2 * INTERVAL)
    assert optimizer.state[frozen]["relation"] == before
    assert "relation" not in optimizer.state[adapter.layers[0].lora_down.weight]
    assert len(partners_of(optimizer, adapter)) == 5


def test_parameters_that_come_later_find_partners():
    adapter = Adapter(repeats=2)
    params = list(adapter.parameters())
    optimizer = AdaptiveHinaAdamW(params[:6], lr=LR, **ALONE)
    run(adapter, optimizer, 1, INTERVAL)
    assert len(partners_of(optimizer, adapter)) == 6
    optimizer.add_param_group({"params": params[6:]})
    run(adapter, optimizer, INTERVAL + 1, 2 * INTERVAL)
    found = partners_of(optimizer, adapter)
    assert {name: partner for name, (partner, _) in found.items()} == adapter.partners()


def test_switched_off_nothing_is_found():
    adapter = Adapter(repeats=1)
    optimizer = adaptive(adapter, named=True, use_dynamic_adaptation=False)
    run(adapter, optimizer, 1, INTERVAL)
    assert partners_of(optimizer, adapter) == {}
    assert not any("relation" in entry for entry in optimizer.state.values())


def test_odd_parameters_beside_matrices():
    """Vectors, scalars and tensors without elements take no part, and disturb nobody."""
    params = parameters(*drawn((6, 5), (5,), (), (1, 1), (3, 2, 4, 2)), torch.zeros(0, 4))
    optimizer = AdaptiveHinaAdamW(params, lr=LR, **{**ALONE, "relationship_discovery_interval": 1})
    for step in range(4):
        for p, grad in zip(
            params, drawn(*(tuple(p.shape) for p in params), seed=step), strict=True
        ):
            p.grad = grad
        optimizer.step()
    assert optimizer.get_relationship_summary()["total_relationships"] == 0
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", [ConvNet, Transformer])
def test_a_network_without_an_adapter_is_trained(network: Any, dtype: torch.dtype):
    """All parameters of a small CNN and of a small transformer: the loss falls, and weights of
    three and four dimensions find partners as matrices."""
    model = network().to(dtype)
    optimizer = AdaptiveHinaAdamW(
        model.parameters(), lr=1e-2, max_lr=2e-2, relationship_discovery_interval=25
    )
    losses = list(train(model, optimizer, 90))
    assert all(map(math.isfinite, losses))
    assert all(p.isfinite().all() for p in model.parameters())
    begin, end = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert end < 0.3 * begin
    found = partners_of(optimizer, model)
    for one, other, product in network.PARTNERS:
        assert found[one] == (other, product)
        assert found[other][0] == one
    assert len(found) == 2 * len(network.PARTNERS)
    told = optimizer.get_relationship_summary()["relationships"]
    shapes = {one["param_shape"] for one in told} | {one["partner_shape"] for one in told}
    if network is ConvNet:
        assert {len(shape) for shape in shapes} == {3, 4}
    for one in told:
        params = list(model.parameters())
        assert one["param_shape"] == tuple(params[one["param_index"]].shape)
