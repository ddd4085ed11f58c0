"""C-Optim's multiplier against its definition, written once more over a run's whole history."""

import json
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.optim.arguments import OptimizerArgumentError
from library.optim.context import ContextAwareLR

SCALES = st.lists(st.integers(1, 12), min_size=1, max_size=5, unique=True)
SETTINGS = st.fixed_dictionaries(
    {
        "context_window": st.integers(2, 30),
        "edge_threshold": st.floats(0.3, 0.999),
        "adaptation_rate": st.floats(0.0, 1.0),
        "momentum_scales": SCALES,
    }
)


# ---- the definition over a run's whole history -------------------------------------------------


class Reference:
    def __init__(
        self,
        context_window: int,
        edge_threshold: float,
        adaptation_rate: float,
        momentum_scales: list[int],
    ) -> None:
        self.window, self.threshold, self.rate = context_window, edge_threshold, adaptation_rate
        self.scales = sorted(momentum_scales)
        self.losses: list[float] = []
        self.cosines: list[float] = []
        self.multiplier = 1.0

    def consistency(self) -> float:
        known = self.cosines[-self.window :]
        if len(known) == 0:
            return 0.5
        means = [statistics.fmean((1 + x) / 2 for x in known[-s:]) for s in self.scales]
        return statistics.fmean(means)

    def trends(self) -> tuple[float, float]:
        shorter = [s for i, s in enumerate(self.scales) if 2 * i < len(self.scales)]
        halves = shorter, [s for s in self.scales if s not in shorter]
        falls = [[self.fall(s) for s in half if s != 1] for half in halves]
        short, long = (statistics.fmean(half) if half else 0.0 for half in falls)
        return short, long

    def fall(self, scale: int) -> float:
        newest_first = self.losses[-self.window :][::-1]
        late, early = newest_first[:scale], newest_first[scale : 2 * scale]
        if len(early) < scale or statistics.fmean(early) <= 0:
            return 0.0
        return 1 - statistics.fmean(late) / statistics.fmean(early)

    def cases(self) -> list[str]:
        losses, cosines = self.losses[-self.window :], self.cosines[-self.window :]
        found = []
        if len(losses) >= 10 and (mean := statistics.fmean(losses)) > 0:
            found += ["unsteady loss"] * (statistics.pstdev(losses) / mean > 0.5)
        if len(cosines) >= 10:
            found += ["turning gradients"] * (self.consistency() < 0.2)
        if len(losses) == self.window:
            half = self.window // 2
            early, late = losses[:half], losses[self.window - half :]
            risen = statistics.fmean(late) > self.threshold * statistics.fmean(early)
            found += ["stagnation"] * risen
        return found

    def advance(self) -> None:
        short, long = self.trends()
        trend = 10 * (short + long) / 2
        trend = math.copysign(1, trend) if abs(trend) > 1 else trend
        target = 1 + 0.5 * (0.5 * (2 * self.consistency() - 1) + 0.5 * trend)
        if self.cases() and target > 1:
            target = 1
        self.multiplier = (1 - self.rate) * self.multiplier + self.rate * target


@st.composite
def courses(draw: st.DrawFn) -> list[tuple[float | None, float | None]]:
    """Losses and cosines of a run in a few stretches, each with its drift, noise and direction.

    Either may be missing for a step; the losses of some runs go below zero.
    """
    rng = random.Random(draw(st.integers(0, 2**32)))
    stretch = st.tuples(
        st.integers(5, 35),
        st.floats(-0.05, 0.05),
        st.sampled_from([0.01, 0.05, 0.2, 0.7]),
        st.sampled_from([-0.8, -0.4, 0.0, 0.9]),
    )
    lift, course = draw(st.sampled_from([0.0, 0.0, -0.7])), []
    level = 1.0
    for steps, drift, noise, likeness in draw(st.lists(stretch, min_size=1, max_size=4)):
        for _ in range(steps):
            level *= math.exp(drift)
            loss = level * math.exp(noise * rng.gauss(0, 1)) + lift
            cosine = min(1.0, max(-1.0, likeness + rng.gauss(0, 0.2)))
            course.append(
                (loss if rng.random() < 0.97 else None, cosine if rng.random() < 0.97 else None)
            )
    return course


def feed(followed: ContextAwareLR | Reference, loss: float | None, cosine: float | None) -> None:
    if isinstance(followed, Reference):
        followed.losses += [] if loss is None else [loss]
        followed.cosines += [] if cosine is None else [cosine]
    else:
        if loss is not None:
            followed.note_loss(loss)
        if cosine is not None:
            followed.note_direction(cosine)
    followed.advance()


@given(SETTINGS, courses())
@settings(max_examples=60, deadline=None)
def test_every_step_follows_the_definition(given_settings, course):
    context, reference = ContextAwareLR(**given_settings), Reference(**given_settings)
    for loss, cosine in course:
        before = context.compute_contextual_lr_multiplier()
        feed(context, loss, cosine)
        feed(reference, loss, cosine)
        assert context.direction_consistency() == pytest.approx(reference.consistency())
        assert context.loss_trends() == pytest.approx(reference.trends(), abs=1e-9)
        cases = reference.cases()
        assert context.edge_case() == (cases[0] if cases else None)
        assert context.detect_edge_case() is bool(cases)
        multiplier = context.compute_contextual_lr_multiplier()
        assert multiplier == pytest.approx(reference.multiplier, rel=1e-9)
        assert 0.5 <= multiplier <= 1.5
        if cases:
            assert multiplier <= max(before, 1)


# ---- a course with a fall, a plateau and a spike -----------------------------------------------

FALL, PLATEAU, SPIKE, END = 0, 250, 450, 650


def recorded() -> list[tuple[float, float]]:
    """1 % less in each step, level from step 250 on; steps 450 to 452 are a spike.

    In the fall gradients agree, on the plateau they are unrelated.
    """
    rng = random.Random(5)
    course = []
    for step in range(END):
        level = math.exp(-0.01 * min(step, PLATEAU)) * (9 if SPIKE <= step < SPIKE + 3 else 1)
        likeness = 0.7 if step < PLATEAU else 0.0
        course.append((level * (1 + rng.gauss(0, 0.02)), likeness + rng.uniform(-0.2, 0.2)))
    return course


@pytest.fixture(scope="module")
def followed() -> tuple[list[str | None], list[float]]:
    """Edge case and multiplier after each step of the course, with the defaults."""
    context, cases, multipliers = ContextAwareLR(), [], []
    for loss, cosine in recorded():
        feed(context, loss, cosine)
        cases.append(context.edge_case())
        multipliers.append(context.compute_contextual_lr_multiplier())
    return cases, multipliers


def test_each_stretch_of_a_run_is_told_as_what_it_is(followed):
    cases, _ = followed
    # Of a window that is 80 steps into the plateau the later half is 4 % below; 75, 6 %.
    begins = cases.index("stagnation")
    assert PLATEAU + 75 <= begins < PLATEAU + 85
    assert set(cases[:begins]) == {None}
    assert set(cases[PLATEAU + 85 : SPIKE]) == {"stagnation"}
    # The spike's second step makes it enough, and as long as two are in the window it counts.
    unsteady = [step for step, case in enumerate(cases) if case == "unsteady loss"]
    assert unsteady == list(range(unsteady[0], unsteady[-1] + 1))
    assert SPIKE <= unsteady[0] <= SPIKE + 1
    assert SPIKE + 100 <= unsteady[-1] <= SPIKE + 101
    assert set(cases[SPIKE + 102 :]) <= {None, "stagnation"}


def test_the_multiplier_rises_in_the_fall_and_returns_on_the_plateau(followed):
    cases, multipliers = followed
    assert multipliers[0] > 1
    assert multipliers[60] > multipliers[20] > multipliers[5] > multipliers[0]
    assert min(multipliers[60:PLATEAU]) > 1.3
    assert all(abs(each - 1) < 0.06 for each in multipliers[PLATEAU + 60 : SPIKE])
    assert min(multipliers[SPIKE : SPIKE + 10]) < 0.9
    for before, after, case in zip(multipliers, multipliers[1:], cases[1:], strict=False):
        assert case is None or after <= max(before, 1)


# ---- edge cases, each at its bound -------------------------------------------------------------


def test_an_unsteady_loss_is_told_from_ten_losses_on():
    context = ContextAwareLR()
    for loss in [0.1, 1.0, 0.1, 4.0, 0.1, 1.0, 0.1, 4.0, 0.1]:
        context.note_loss(loss)
        assert context.edge_case() is None
    context.note_loss(1.0)
    assert context.edge_case() == "unsteady loss"


@pytest.mark.parametrize(("apart", "case"), [(0.49, None), (0.51, "unsteady loss")])
def test_half_of_the_mean_apart_is_unsteady(apart, case):
    context = ContextAwareLR()
    for _ in range(10):
        context.note_loss(1 - apart)
        context.note_loss(1 + apart)
    assert context.edge_case() == case


def test_losses_of_no_positive_mean_are_not_called_unsteady():
    context = ContextAwareLR()
    for _ in range(10):
        context.note_loss(-1.0)
        context.note_loss(-5.0)
    assert context.edge_case() is None
    assert context.loss_trends() == (0.0, 0.0)


def test_turning_gradients_are_told_from_ten_cosines_on():
    context = ContextAwareLR(momentum_scales=[1, 20])
    for _ in range(9):
        context.note_direction(-0.61)
        assert not context.detect_edge_case()
    context.note_direction(-0.61)
    assert context.edge_case() == "turning gradients"
    context.note_direction(-0.5)
    assert context.edge_case() is None  # (0.25 + (10·0.195 + 0.25)/11)/2 = 0.225


@pytest.mark.parametrize(("later", "case"), [(0.94, None), (0.96, "stagnation")])
@pytest.mark.parametrize("window", [12, 13])
def test_stagnation_is_told_from_a_full_window(later, case, window):
    context = ContextAwareLR(context_window=window)
    # Were the odd middle to belong to a half, 0.7 or 1.3 in it would turn the answer.
    middle = [0.7 if case else 1.3] * (window % 2)
    for loss in [1.0] * 6 + middle + [later] * 6:
        assert context.edge_case() is None
        context.note_loss(loss)
    assert context.edge_case() == case


def test_an_edge_case_lowers_what_it_may_not_raise():
    context = ContextAwareLR(context_window=20, adaptation_rate=0.5)
    for _ in range(20):
        feed(context, 1.0, 1.0)  # one direction: the target is 1.25 until the loss stagnates
        if not context.detect_edge_case():
            raised = context.compute_contextual_lr_multiplier()
    assert context.edge_case() == "stagnation"
    assert raised > 1.2
    assert context.compute_contextual_lr_multiplier() == 1 + (raised - 1) / 2


# ---- scales ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "short", "long"),
    [
        ([1, 5, 10, 25], [5], [10, 25]),
        ([25, 10, 5, 1], [5], [10, 25]),
        ((2, 4, 8), [2, 4], [8]),
        ([1, 3], [], [3]),
        ([6], [6], []),
        ([1], [], []),
        ([3, 60], [3], [60]),
    ],
)
def test_the_shorter_half_of_the_scales_makes_the_short_trend(scales, short, long):
    context = ContextAwareLR(momentum_scales=scales)
    for step in range(100):
        context.note_loss(0.99**step)

    def expected(half: list[int]) -> float:
        falls = [1 - 0.99**scale if 2 * scale <= 100 else 0.0 for scale in half]
        return sum(falls) / max(len(falls), 1)

    assert context.loss_trends() == pytest.approx((expected(short), expected(long)))


# ---- saved and continued -----------------------------------------------------------------------


@given(SETTINGS, courses(), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_an_interrupted_run_continues_exactly(given_settings, course, where):
    whole, first = ContextAwareLR(**given_settings), ContextAwareLR(**given_settings)
    cut = int(where * len(course))
    for loss, cosine in course:
        feed(whole, loss, cosine)
    for loss, cosine in course[:cut]:
        feed(first, loss, cosine)
    second = ContextAwareLR(**given_settings)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    for loss, cosine in course[cut:]:
        feed(second, loss, cosine)
    assert second.state_dict() == whole.state_dict()
    assert second.edge_case() == whole.edge_case()
    assert second.compute_contextual_lr_multiplier() == whole.compute_contextual_lr_multiplier()


def test_before_the_first_step_nothing_is_known():
    context = ContextAwareLR()
    assert context.compute_contextual_lr_multiplier() == 1
    assert context.direction_consistency() == 0.5
    assert context.loss_trends() == (0, 0)
    assert context.edge_case() is None
    context.advance()
    assert context.compute_contextual_lr_multiplier() == 1


def test_a_state_is_a_copy_and_asking_changes_nothing():
    context = ContextAwareLR()
    feed(context, 1.0, 0.5)
    state = context.state_dict()
    before = json.dumps(state)
    context.compute_contextual_lr_multiplier(), context.edge_case(), context.loss_trends()
    assert json.dumps(context.state_dict()) == before
    feed(context, 2.0, 0.5)
    assert json.dumps(state) == before


def test_of_a_longer_window_the_newest_values_are_kept():
    longer, shorter = ContextAwareLR(context_window=20), ContextAwareLR(context_window=5)
    for step in range(20):
        feed(longer, 1.0 + step, step / 20)
    shorter.load_state_dict(longer.state_dict())
    saved = longer.state_dict()
    assert shorter.state_dict() == {
        "losses": [16.0, 17.0, 18.0, 19.0, 20.0],
        "cosines": saved["cosines"][-5:],
        "multiplier": saved["multiplier"],
    }
    shorter.note_loss(21.0)
    assert shorter.state_dict()["losses"] == [17.0, 18.0, 19.0, 20.0, 21.0]
    longer.load_state_dict(shorter.state_dict())
    longer.note_loss(22.0)
    assert longer.state_dict()["losses"] == [17.0, 18.0, 19.0, 20.0, 21.0, 22.0]


# ---- what may be given -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"context_window": 1},
        {"context_window": 10.5},
        {"context_window": True},
        {"edge_threshold": 0},
        {"edge_threshold": 1.0},
        {"edge_threshold": math.nan},
        {"adaptation_rate": -0.1},
        {"adaptation_rate": 1.1},
        {"adaptation_rate": "fast"},
        {"momentum_scales": []},
        {"momentum_scales": 5},
        {"momentum_scales": [1, 0]},
        {"momentum_scales": [1, 2.5]},
        {"momentum_scales": [5, 5]},
        {"momentum_scales": [[5], 1]},
    ],
    ids=str,
)
def test_an_impossible_argument_is_named(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(OptimizerArgumentError) as refused:
        ContextAwareLR(**wrong)
    assert f"C-Optim: {key}={value!r} is not possible; {key} must be" in str(refused.value)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(loss):
    context = ContextAwareLR()
    with pytest.raises(ValueError, match=f"loss of {loss}; it must be finite"):
        context.note_loss(loss)
    assert context.state_dict() == ContextAwareLR().state_dict()


@pytest.mark.parametrize("cosine", [math.nan, math.inf, -math.inf, 1.02, -1.02])
def test_an_impossible_cosine_is_refused(cosine):
    context = ContextAwareLR()
    with pytest.raises(ValueError, match=f"cosine of {cosine}; it must lie in"):
        context.note_direction(cosine)
    assert context.state_dict() == ContextAwareLR().state_dict()


@pytest.mark.parametrize(("cosine", "kept"), [(1 + 2**-7, 1.0), (-1 - 2**-23, -1.0)])
def test_a_cosine_that_rounding_made_too_large_is_clamped(cosine, kept):
    context = ContextAwareLR()
    context.note_direction(cosine)
    assert context.state_dict()["cosines"] == [kept]
    assert context.direction_consistency() == (kept + 1) / 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"multiplier": None}, "lacks multiplier"),
        ({"losses": None, "cosines": None}, "lacks losses, cosines"),
        ({"multiplier": 1.6}, "multiplier of C-Optim is 1.6"),
        ({"multiplier": math.nan}, "multiplier of C-Optim is nan"),
        ({"losses": [1.0, math.inf]}, "loss of inf"),
        ({"cosines": [0.0, -3.0]}, "cosine of -3.0"),
    ],
    ids=str,
)
def test_an_impossible_state_is_refused_and_changes_nothing(change, told):
    context = ContextAwareLR()
    feed(context, 1.0, 0.5)
    before = context.state_dict()
    saved = {"losses": [2.0], "cosines": [0.1], "multiplier": 1.2, **change}
    with pytest.raises(ValueError, match=told):
        context.load_state_dict({key: value for key, value in saved.items() if value is not None})
    assert context.state_dict() == before


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    SCALES,
)
@settings(max_examples=60, deadline=None)
def test_any_finite_losses_are_borne(losses, scales):
    context = ContextAwareLR(10, adaptation_rate=1, momentum_scales=scales)
    for loss in losses:
        feed(context, loss, None)
        assert 0.5 <= context.compute_contextual_lr_multiplier() <= 1.5
