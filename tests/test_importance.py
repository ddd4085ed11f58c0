"""Importance against its definition, written once more in plain loops over single parameters."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import drawn, each_backend, parameters, same
from torch import Tensor, nn

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.techniques.importance import LEAST, MOST, fair_factors, importances

OFF = dict.fromkeys(AdaptiveHinaAdamW.SWITCHES, False)
# A threshold that nothing is above: importance acts without relations.
ALONE = {
    **OFF,
    "use_dynamic_adaptation": True,
    "compatibility_threshold": 1.0,
    "optim_bits": 32,
}
LR, DECAY, STRENGTH, STEPS = 1e-2, 0.9, 0.8, 60


class Network(nn.Module):
    """Layers of every kind of shape; `late` and `seldom` are not in every step's graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 20, bias=False)
        self.seldom = nn.Linear(20, 20)
        self.late = nn.Linear(20, 20)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.last = nn.Linear(20, 2)
        nn.init.zeros_(self.last.weight)
        nn.init.normal_(self.norm.weight)

    def loss(self, step: int, missing: bool) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(16, 3, 10, generator=draw)
        hidden = self.second(self.norm(self.first(x).mean(2))).tanh()
        if not missing or step % 3:
            hidden = hidden + self.seldom(hidden)
        if not missing or step > 10:
            hidden = hidden + self.late(hidden).relu()
        wanted = torch.stack([x.mean((1, 2)), x[:, 0, 0]], 1)
        return (self.last(hidden * self.scale) - wanted).square().mean()


class Reference:
    """The importance of one parameter, in float64."""

    def __init__(self) -> None:
        self.importance = 1.0
        self.norms: list[float] = []
        self.start = -1.0

    def look(self, p: Tensor, grad: Tensor) -> tuple[float, float, float]:
        """gradient, change and intrinsic of this step, not yet divided by their means."""
        entries, slopes = p.double().flatten(), grad.double().flatten()
        norm, size = math.sqrt(sum(slopes * slopes)), math.sqrt(sum(entries * entries))
        if not self.norms:
            self.start = size
        self.norms.append(norm)
        weights = [0.9**age for age in range(len(self.norms))][::-1]
        mean = sum(w * n for w, n in zip(weights, self.norms, strict=True)) / sum(weights)
        spread = [w * (n - mean) ** 2 for w, n in zip(weights, self.norms, strict=True)]
        std = math.sqrt(sum(spread) / sum(weights))
        consistency = max(1 - std / mean, 0.1) if mean else 1.0
        largest = max(size, self.start)
        change = abs(size - self.start) / largest if largest else 0.0
        centre = sum(entries) / len(entries)
        variance = float(sum((entries - centre) ** 2) / len(entries))
        share = sum(abs(float(entry)) >= 1e-6 for entry in entries) / len(entries)
        return norm * consistency, change, variance * share


def reference_step(references: list[Reference], ps: list[Tensor], grads: list) -> None:
    """Carry the importances of those parameters on that have a gradient."""
    active = [k for k, grad in enumerate(grads) if grad is not None]
    scores = {k: references[k].look(ps[k], grads[k]) for k in active}
    means = [sum(scores[k][i] for k in active) / len(active) for i in range(3)]
    for k in active:
        shares = [s / m if m else 1.0 for s, m in zip(scores[k], means, strict=True)]
        raw = 0.4 * shares[0] + 0.3 * shares[1] + 0.3 * shares[2]
        references[k].importance = DECAY * references[k].importance + (1 - DECAY) * raw


def bisected(importance: list[float], strength: float) -> list[float]:
    """clamp(c·importance, 0.1, 3) with the c whose mean is `strength`, by halving."""
    low, high = -800.0, 800.0
    for _ in range(200):
        c = math.exp((low + high) / 2)
        factors = [min(max(c * each, 0.1), 3.0) for each in importance]
        if sum(factors) < strength * len(factors):
            low = (low + high) / 2
        else:
            high = (low + high) / 2
    return factors


def effective_lrs(optimizer: AdaptiveHinaAdamW) -> list[float]:
    """Of the parameters that took part in the last step, in their order."""
    (record,) = optimizer.last_step
    return record.values["effective_lr"].tolist()


def per_parameter(
    optimizer: AdaptiveHinaAdamW,
) -> tuple[list[float], list[bool]]:
    overview = optimizer.overview()
    return importances(overview).tolist(), overview.begun.tolist()


@each_backend
@pytest.mark.parametrize("missing", [False, True], ids=["all gradients", "some missing"])
def test_importance_is_its_definition(backend: str, missing: bool):
    model = Network()
    params = list(model.parameters())
    options = {**ALONE, "importance_decay": DECAY, "adaptation_strength": STRENGTH}
    optimizer = AdaptiveHinaAdamW(params, lr=LR, backend=backend, **options)
    references = [Reference() for _ in params]
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model.loss(step, missing).backward()
        grads = [None if p.grad is None else p.grad.clone() for p in params]
        before = [p.detach().clone() for p in params]
        active = [k for k, grad in enumerate(grads) if grad is not None]
        assert missing or len(active) == len(params)
        factors = bisected([relative(references)[k] for k in active], STRENGTH)
        optimizer.step()

        wanted = [LR * factor for factor in factors]
        assert effective_lrs(optimizer) == pytest.approx(wanted, rel=1e-6)
        assert sum(effective_lrs(optimizer)) / len(active) == pytest.approx(LR * STRENGTH, rel=1e-9)
        reference_step(references, before, grads)
        found, begun = per_parameter(optimizer)
        assert begun == [bool(each.norms) for each in references]
        assert found == pytest.approx(relative(references), rel=1e-6)
        assert order(found) == order(relative(references))
        taken = [each for each, has in zip(found, begun, strict=True) if has]
        assert sum(taken) / len(taken) == pytest.approx(1.0, abs=1e-9)
    assert max(found) > 1.5
    assert min(found) < 0.5
    assert missing == (len({optimizer.state[p]["step"] for p in params}) > 1)


def relative(references: list[Reference]) -> list[float]:
    """Importances divided by their mean over those that have taken a step; 1 for the others."""
    taken = [each.importance for each in references if each.norms] or [1.0]
    mean = sum(taken) / len(taken)
    return [each.importance / mean if each.norms else 1.0 for each in references]


def order(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=values.__getitem__)


def shared_out(importance: list[float], strength: float) -> Tensor:
    """Factors of parameters that all count the same."""
    values = torch.tensor(importance, dtype=torch.float64)
    return fair_factors(values, strength, torch.ones_like(values))


@given(
    st.lists(
        st.one_of(st.just(0.0), st.floats(-300, 3).map(lambda power: 10.0**power)),
        min_size=1,
        max_size=20,
    ),
    st.floats(0.05, 4.0),
)
@settings(max_examples=300, deadline=None)
def test_factors_have_the_strength_as_their_mean(importance: list[float], strength: float):
    found = shared_out(importance, strength).tolist()
    strength = min(max(strength, LEAST), MOST)
    assert sum(found) / len(found) == pytest.approx(strength, rel=1e-9)
    assert all(LEAST <= factor <= MOST for factor in found)
    assert [found[k] for k in order(importance)] == sorted(found)
    # What is all but nothing counts as so much: no number is small enough to make it more.
    floored = [max(each, 1e-100) for each in importance]
    assert found == pytest.approx(bisected(floored, strength), rel=1e-6)


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0.001, 10)), min_size=1, max_size=20),
    st.floats(0.1, 3.0),
)
def test_the_mean_counts_what_acts_within_each_parameter(pairs: list[tuple[float, float]], wanted):
    importance, weights = (
        torch.tensor(each, dtype=torch.float64) for each in zip(*pairs, strict=True)
    )
    found = fair_factors(importance, wanted, weights)
    assert float((found * weights).sum() / weights.sum()) == pytest.approx(wanted, rel=1e-9)


def test_masks_that_go_with_importance_leave_the_mean_rate_as_it_is():
    """Large gradients of one sign, whose masks rise, and small ones that turn."""
    params = parameters(*drawn(*[(8, 6)] * 20))
    optimizer = AdaptiveHinaAdamW(params, lr=1e-4, relationship_discovery_interval=999)
    for step in range(80):  # later mask times importance would come to the limit of 10
        for k, (p, noise) in enumerate(zip(params, drawn(*[(8, 6)] * 20, seed=step), strict=True)):
            p.grad = (noise.abs() + 1) * (k + 1) if k % 2 else 0.01 * noise
        optimizer.step()
        values = optimizer.last_step[0].values
        masks = [
            one["avg_lr_scale"] for one in optimizer.get_lr_mask_analysis()["parameter_analysis"]
        ]
        mean = float(values["effective_lr"].mean()) / (1e-4 * sum(masks) / len(masks))
        assert mean == pytest.approx(1, abs=0.01)
    assert max(masks) > 3 * min(masks)


@pytest.mark.parametrize(
    "importance",
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1e-320, 4.0], [1.0, 1.3, 1e-312], [1e9], [0.3, 0.1, 1e-20]],
)
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.9])
def test_importances_that_have_all_but_gone(importance: list[float], strength: float):
    """A parameter that never moves loses its importance by powers of the decay."""
    found = shared_out(importance, strength)
    assert float(found.mean()) == pytest.approx(strength, rel=1e-12)


def test_a_parameter_without_gradients_takes_no_share():
    """What stands still does not make up for what the limits take from those that move."""
    params = parameters(*drawn(*[(6, 4)] * 40))
    optimizer = AdaptiveHinaAdamW(params, lr=LR, **ALONE)
    for step in range(30):
        for k, p in enumerate(params[:10]):
            p.grad = (1e3 if k == 0 else 1.0) * drawn((6, 4), seed=100 * step + k)[0]
        optimizer.step()
    lrs = effective_lrs(optimizer)
    assert len(lrs) == 10
    assert sum(lrs) / 10 == pytest.approx(LR, rel=1e-9)
    assert max(lrs) > 2 * min(lrs)


@each_backend
def test_mean_effective_lr_of_a_run_is_that_of_the_mask(backend: str):
    """All that is on by default, in warm-up and behind it; with relations that found nothing."""
    model, lr = Network(), 1e-3
    params = list(model.parameters())
    limits = {"max_lr": 1e-2, "warmup_steps": 40, "compatibility_threshold": 1.0}
    optimizer = AdaptiveHinaAdamW(params, lr=lr, backend=backend, **limits)
    ratios = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model.loss(step, False).backward()
        optimizer.step()
        masks = [float(optimizer.masks(p).mean()) for p in params]
        records = [record.values["effective_lr"].tolist() for record in optimizer.last_step]
        assert sum(map(len, records)) == len(params)
        ratios.append(sum(map(sum, records)) / sum(masks))
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.005)
    assert ratios == pytest.approx([1.0] * STEPS, abs=0.01)
    assert max(masks) > 1.05 * lr  # they have moved
    found, _ = per_parameter(optimizer)
    assert max(found) > 1.5


@each_backend
def test_ten_times_the_contribution_gets_a_higher_lr(backend: str):
    """All else is equal: Adam's steps are the same for gradients of any size."""
    params = parameters(*[drawn((12, 9))[0]] * 3)
    optimizer = AdaptiveHinaAdamW(params, lr=LR, backend=backend, **ALONE)
    for step in range(40):
        for p, size in zip(params, (1.0, 10.0, 3.0), strict=True):
            p.grad = size * drawn((12, 9), seed=step)[0]
        optimizer.step()
    small, large, middle = effective_lrs(optimizer)
    assert large > middle > small
    assert large > 1.5 * small
    found, _ = per_parameter(optimizer)
    assert order(found) == [0, 2, 1]
    assert small + large + middle == pytest.approx(3 * LR, rel=1e-9)


def test_the_variance_of_weights_around_one():
    """As those of norms: all but the same, so that sums of squares leave few digits of it."""
    wide, narrow = torch.randn(64, 8), 1 + 1e-3 * torch.randn(300)
    params = parameters(wide, narrow)
    optimizer = AdaptiveHinaAdamW(params, lr=0.0, **ALONE)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    (record,) = optimizer.last_step
    wanted = [float(p.double().var(correction=0)) for p in (wide, narrow)]
    assert record.values["importance/intrinsic"].tolist() == pytest.approx(wanted, abs=3e-7)


@each_backend
@pytest.mark.parametrize("options", [ALONE, {}], ids=["alone", "defaults"])
def test_nothing_to_measure_stays_finite(backend: str, options: dict):
    params = parameters(
        torch.zeros(5, 4), torch.randn(5, 4), torch.zeros(1), torch.ones(1), torch.tensor(2.0)
    )
    params.append(nn.Parameter(torch.zeros(0, 3)))  # takes no step at all
    start = [p.detach().clone() for p in params]
    optimizer = AdaptiveHinaAdamW(params, lr=LR, importance_decay=0.5, backend=backend, **options)
    for step in range(12):
        for p in params:
            p.grad = torch.zeros_like(p)
        if step > 6:
            params[2].grad.fill_(1.0)
        optimizer.step()
        found, begun = per_parameter(optimizer)
        assert all(math.isfinite(each) for each in found)
        assert begun == [True] * 5 + [False]
        assert all(p.isfinite().all() for p in params)
    assert params[2] != start[2]
    assert all(
        math.isfinite(lr) and lr > 0 for r in optimizer.last_step for lr in r.values["effective_lr"]
    )


def test_backends_agree():
    optimizers = []
    for backend in ("compiled", "eager"):
        model = Network()
        optimizers.append(AdaptiveHinaAdamW(model.parameters(), lr=LR, backend=backend, **ALONE))
        for step in range(1, 31):
            optimizers[-1].zero_grad()
            model.loss(step, True).backward()
            optimizers[-1].step()
    one, other = (per_parameter(optimizer)[0] for optimizer in optimizers)
    # Each backend trains its own model, which rounding leads a little apart.
    assert one == pytest.approx(other, rel=1e-3)
    assert order(one) == order(other)


def carry_on(
    model: Network, groups: Callable[[Network], list], saved: dict | None, first: int, last: int
) -> AdaptiveHinaAdamW:
    """Steps `first` to `last`, on from a saved state."""
    optimizer = AdaptiveHinaAdamW(groups(model), lr=LR, **ALONE)
    if saved is not None:
        optimizer.load_state_dict(saved)
    for step in range(first, last + 1):
        optimizer.zero_grad()
        model.loss(step, True).backward()
        optimizer.step()
    return optimizer


def in_order(model: Network) -> list:
    return list(model.named_parameters())


def turned(model: Network) -> list:
    """The same in two groups, in another order."""
    items = list(model.named_parameters())[::-1]
    return [{"params": items[::2]}, {"params": items[1::2]}]


def test_saved_and_resumed_bit_for_bit():
    model = Network()
    first = carry_on(model, in_order, None, 1, 12)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = copy.deepcopy(model)
    whole = carry_on(model, in_order, first.state_dict(), 13, 25)
    resumed = carry_on(twin, in_order, saved, 13, 25)
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(model.state_dict(), twin.state_dict())
    assert "importance" in resumed.state[twin.scale]


def test_grouped_otherwise_importance_goes_with_the_name():
    model = Network()
    first = carry_on(model, in_order, None, 1, 12)
    twin = copy.deepcopy(model)
    regrouped = carry_on(twin, turned, copy.deepcopy(first.state_dict()), 13, 12)
    for name, p in model.named_parameters():
        assert same(first.state[p], regrouped.state[twin.get_parameter(name)])
    saved = copy.deepcopy(first.state_dict())
    carry_on(model, in_order, saved, 13, 25)
    carry_on(twin, turned, saved, 13, 25)
    # Another order of summing: another last bit of a mean.
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-5, atol=1e-7)
