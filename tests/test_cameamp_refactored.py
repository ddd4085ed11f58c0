"""What users of `automagic_cameamp_refactored` know, block by block of its first description; and
strategies of their own in a run."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from cameamp_reference import ONLY_CAME
from optimizers import each_backend
from torch import Tensor, nn

import library.automagic_cameamp_refactored as refactored
import library.custom_automagic_cameamp_optimizer as family
from library.automagic_cameamp_refactored import (
    MomentumStrategy,
    OptimizerConfig,
    RefactoredAutomagicCameAMP,
    RegularizationStrategy,
    create_full_finetune_optimizer,
    create_lora_optimizer,
)
from library.optim.cameamp_config import NO_REGULARIZERS

EAGER = {"backend": "eager"}
ALONE: dict[str, Any] = {**NO_REGULARIZERS, "weight_decay": 0.0, "use_spd": False, **EAGER}

CLASSES = [getattr(family, name) for name in family.__all__]


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 1))


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The loop of the description."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 1, 4, 4, generator=generator)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - x.mean((1, 2, 3))).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.fixture(params=["library.automagic_cameamp_refactored", "automagic_cameamp_refactored"])
def module(request) -> Any:
    return importlib.import_module(request.param)


def test_both_paths_lead_to_the_same(module):
    assert all(getattr(module, name) is getattr(refactored, name) for name in refactored.__all__)


def test_basic_usage_learns(module):
    model = small_model()
    optimizer = module.create_lora_optimizer(
        model.parameters(), lr=1e-4, warmup_steps=500, max_lr=2e-3, lr_bump=5e-5, **EAGER
    )
    found = losses(model, optimizer, 40)
    assert found[-1] < 0.7 * found[0]


def test_a_config_of_ones_own(module):
    config = module.OptimizerConfig(
        lr=2e-4,
        warmup_steps=300,
        edge_suppression=True,
        spatial_awareness=True,
        lora_rank_penalty=True,
        verbose=True,
    )
    optimizer = module.RefactoredAutomagicCameAMP(small_model().parameters(), config)
    assert optimizer.config is config
    assert optimizer.param_groups[0]["lr"] == 2e-4
    with pytest.raises(FrozenInstanceError):
        config.lr = 1e-3


TOLD = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "warmup_steps": 500,
    "edge_suppression": True,
    "edge_threshold": 0.6,
    "edge_penalty": 0.1,
    "background_regularization": True,
    "lora_rank_penalty": True,
    "rank_penalty_strength": 0.01,
    "low_rank_emphasis": 1.2,
    "spatial_awareness": True,
    "frequency_penalty": 0.05,
    "detail_preservation": 0.8,
}


def test_the_defaults_that_users_know():
    config = vars(OptimizerConfig())
    assert {name: config[name] for name in TOLD} == TOLD


LORA = {"lr": 1e-4, "warmup_steps": 500, "edge_suppression": True, "spatial_awareness": True}
FULL = {"lr": 5e-5, "warmup_steps": 200, "edge_suppression": False}
IMAGE = {"lr": 1e-4, "edge_suppression": True, "frequency_penalty": 0.08}
IMAGE |= {"spatial_awareness": True, "background_regularization": True}
LANGUAGE = {"lr": 2e-5, "lora_rank_penalty": True, "edge_suppression": False}
LANGUAGE |= {"spatial_awareness": False, "warmup_steps": 1000}

BASIC = ["FrequencyPenalty", "BackgroundRegularization"]
USES: list[tuple[Callable[..., Any], dict[str, Any], list[str]]] = [
    (create_lora_optimizer, LORA, ["EdgeSuppression", *BASIC, "SpatialAwareness", "RankPenalty"]),
    (create_full_finetune_optimizer, FULL, [*BASIC, "SpatialAwareness", "RankPenalty"]),
    (
        RefactoredAutomagicCameAMP,
        IMAGE,
        ["EdgeSuppression", *BASIC, "SpatialAwareness", "RankPenalty"],
    ),
    (RefactoredAutomagicCameAMP, LANGUAGE, [*BASIC, "RankPenalty"]),
]


@pytest.mark.parametrize(("make", "options", "acting"), USES, ids=["lora", "full", "image", "text"])
def test_the_four_uses(make, options, acting):
    model = small_model()
    if make is RefactoredAutomagicCameAMP:
        optimizer = make(model.parameters(), OptimizerConfig(**options, **EAGER))
    else:
        optimizer = make(model.parameters(), **options, **EAGER)
    assert {name: vars(optimizer.config)[name] for name in options} == options
    assert optimizer.get_optimization_info()["regularizers"] == acting
    found = losses(model, optimizer, 12)
    assert found[-1] < found[0]


def test_a_checkpoint_as_it_was_written(tmp_path):
    model = small_model()
    config = OptimizerConfig(lr=1e-3, warmup_steps=6, **EAGER)
    optimizer = RefactoredAutomagicCameAMP(model.parameters(), config)
    losses(model, optimizer, 4)
    checkpoint = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "config": optimizer.config.__dict__,
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert OptimizerConfig(**checkpoint["config"]) == config
    resumed = small_model()
    resumed.load_state_dict(checkpoint["model_state_dict"])
    new_optimizer = RefactoredAutomagicCameAMP(resumed.parameters(), config)
    new_optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    # Over the end of the warm-up and the eleventh step's regularizers.
    assert losses(resumed, new_optimizer, 10) == losses(model, optimizer, 10)


@pytest.mark.parametrize("cls", CLASSES)
def test_verbose_names_the_class(cls, capsys):
    model = small_model()
    losses(model, cls(model.parameters(), verbose=True, **EAGER), 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [f"{cls.__name__} step {k}" for k in (1, 2)]


FIELDS = [one.name for one in fields(OptimizerConfig)]


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_refuses_what_is_none_of_its_kind(field):
    with pytest.raises(ValueError, match=rf"^OptimizerConfig: {field}=<object .* must be"):
        OptimizerConfig(**{field: object()})
    with pytest.raises(ValueError, match=rf"\b{field}="):
        create_lora_optimizer([nn.Parameter(torch.ones(2, 2))], **{field: "none of these"})


NUMBERS = [one.name for one in fields(OptimizerConfig) if type(one.default) is float]


@pytest.mark.parametrize("field", NUMBERS)
def test_each_number_is_finite_and_none_is_true(field):
    for value in (float("nan"), float("inf"), True, "0.1"):
        with pytest.raises(ValueError, match=rf"\b{field}={value!r} is not possible"):
            OptimizerConfig(**{field: value})


def test_profiles_set_this_and_nothing_else():
    everything = vars(OptimizerConfig())
    lean = {**NO_REGULARIZERS, "force_8bit": True, "min_8bit_size": 1024}
    assert vars(OptimizerConfig.of_profile("memory_optimized")) == {**everything, **lean}
    rich = {"edge_penalty": 0.15, "frequency_penalty": 0.08, "rank_penalty_strength": 0.02}
    assert vars(OptimizerConfig.of_profile("quality_optimized")) == {**everything, **rich}
    assert vars(OptimizerConfig.of_profile("balanced")) == everything


@pytest.mark.parametrize("cls", [*CLASSES, RefactoredAutomagicCameAMP])
def test_what_is_given_wins_over_a_profile(cls):
    default = {"min_8bit_size": 4096, "edge_suppression": True, "force_8bit": False}
    config = cls.configured(profile="memory_optimized", **default)
    assert {name: vars(config)[name] for name in default} == default
    assert not config.spatial_awareness
    lean = cls([nn.Parameter(torch.ones(40, 40))], profile="memory_optimized", **EAGER)
    assert lean.optim_bits == 8
    assert lean.regularizers.strategies == ()


@pytest.mark.parametrize("cls", CLASSES)
def test_the_signature_shows_what_a_class_does(cls):
    shown = inspect.signature(cls).parameters
    assert list(shown)[:2] == ["params", "lr"]
    assert set(shown) == {"params", "profile", *FIELDS}
    done = vars(cls.configured())
    if "edge_threshold" in cls.ALIASES:
        done["edge_threshold"] = done["stagnation_threshold"]
    assert {name: shown[name].default for name in FIELDS} == done


class Nothing(RegularizationStrategy):
    def apply(self, grad: Tensor, **kwargs: Any) -> Tensor:
        return torch.zeros_like(grad)


@pytest.mark.parametrize("cls", [*CLASSES, RefactoredAutomagicCameAMP])
def test_a_regularizer_of_ones_own_acts_on_every_parameter(cls):
    """Vectors and numbers too: without a gradient nothing moves."""
    shapes = [(4, 6), (3, 2, 3, 3), (5,), ()]
    for own, moves in (([], True), ([Nothing()], False)):
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = cls(params, lr=1e-3, extra_regularizers=own, **ALONE)
        for p in params:
            p.grad = torch.linspace(0.1, 1, p.numel()).reshape(p.shape)
        optimizer.step()
        assert [bool((p != 1).any()) for p in params] == [moves] * len(params)


class Steps(RegularizationStrategy):
    """Tells the steps at which it acted."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, list[str]]] = []

    def apply(self, grad: Tensor, *, step: int, phase: str, names: list[str], **_: Any) -> Tensor:
        self.seen.append((step, phase, names))
        return grad


def test_every_tenth_step_and_each_parameter_by_its_own_count():
    own, options = Steps(), {"warmup_steps": 20, **ALONE}
    params = {name: nn.Parameter(torch.ones(2, 3)) for name in ("early", "late")}
    optimizer = create_lora_optimizer(params.items(), extra_regularizers=[own], **options)
    for step in range(1, 26):
        params["early"].grad = torch.ones(2, 3)
        params["late"].grad = torch.ones(2, 3) if step > 5 else None
        optimizer.step()
    times = [(1, "early_warmup"), (11, "late_warmup"), (21, "stable")]
    expected = [(*time, ["early"]) for time in times]
    expected += [(*time, ["late"]) for time in times[:2]]
    assert sorted(own.seen) == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_in_regularizers_leave_autograds_gradients(dtype):
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((6, 8), (4, 2, 3, 3))]
    optimizer = create_lora_optimizer(params, profile="quality_optimized", **EAGER)
    assert len(optimizer.regularizers.strategies) == 5
    kept = [torch.randn(p.shape).to(dtype) for p in params]
    for p, grad in zip(params, kept, strict=True):
        p.grad = grad.clone()
    optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, kept, strict=True))


def test_in_a_stack_each_gradient_is_regularized_as_if_it_came_alone():
    generator = torch.Generator().manual_seed(0)
    grads = [size * torch.randn(6, 8, generator=generator) for size in (1.0, 1e-3, 10.0)]

    def moved(grads: list[Tensor]) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(6, 8)) for _ in grads]
        optimizer = create_lora_optimizer(params, lr=1e-3, profile="quality_optimized", **EAGER)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        return [p.detach() for p in params]

    alone = [moved([grad])[0] for grad in grads]
    assert not torch.allclose(alone[0], alone[1], atol=1e-4)
    for one, in_stack in zip(alone, moved(grads), strict=True):
        assert torch.allclose(one, in_stack, atol=1e-7)


class FirstOfStack(RegularizationStrategy):
    batched = True

    def apply(self, grad: Tensor, **context: Any) -> Tensor:
        return grad[:1]


def test_a_stack_that_comes_back_smaller_is_refused():
    params = {name: nn.Parameter(torch.ones(2, 3)) for name in ("first", "second")}
    optimizer = create_lora_optimizer(params.items(), extra_regularizers=[FirstOfStack()], **ALONE)
    for p in params.values():
        p.grad = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"FirstOfStack.apply .* \(1, 2, 3\) .* first; .*\(2, 2"):
        optimizer.step()
    assert all(torch.equal(p, torch.ones(2, 3)) for p in params.values())


class Slow(MomentumStrategy):
    def __init__(self, share: float) -> None:
        self.share = share

    def beta1(self, work: Any) -> Tensor:
        return 0.0 * work.beta1 + self.share


@each_backend
def test_a_momentum_of_ones_own_in_machine_code_too(backend):
    """Two of one class that hold different numbers are two programs."""
    for share in (0.5, 0.9):
        ours, plain = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
        own = {"momentum": Slow(share), "backend": backend}
        betas = {"betas": (share, 0.99, 0.999), "backend": "eager"}
        for p, options in ((ours, own), (plain, betas)):
            optimizer = create_lora_optimizer([p], lr=1e-3, **{**ONLY_CAME, **options})
            for step in range(4):
                p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
                optimizer.step()
        assert torch.allclose(ours, plain, atol=1e-6)
        assert not torch.allclose(ours, torch.ones(4, 6), atol=1e-4)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_twin_trains_alike_to_the_bit_and_by_itself(twin_of):
    params = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5))]
    own = {"extra_regularizers": [Nothing()], "momentum": Slow(0.7), "regularization_interval": 2}
    optimizer = create_lora_optimizer(params, warmup_steps=4, **own, **EAGER)

    def train(which: RefactoredAutomagicCameAMP, first: int) -> list[Tensor]:
        held = which.param_groups[0]["params"]
        for step in range(first, first + 4):
            generator = torch.Generator().manual_seed(step)
            for p in held:
                p.grad = torch.randn(p.shape, generator=generator)
            which.step()
        return held

    train(optimizer, 0)
    twin = twin_of(optimizer)
    before = [p.detach().clone() for p in params]
    theirs = train(twin, 4)
    assert all(map(torch.equal, params, before)), "the original has moved with its twin"
    ours = train(optimizer, 4)
    assert all(map(torch.equal, ours, theirs))
    assert not any(map(torch.equal, ours, before))
