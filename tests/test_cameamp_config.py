"""What can be set of the CameAMP family: names, defaults, profiles, mistakes; the Python API."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import library.custom_automagic_cameamp_optimizer as family
from library.automagic_cameamp_refactored import (
    MomentumStrategy,
    OptimizerConfig,
    RefactoredAutomagicCameAMP,
    RegularizationStrategy,
    create_full_finetune_optimizer,
    create_lora_optimizer,
)
from library.optim.arguments import OptimizerArgumentError
from library.optim.cameamp_config import NO_REGULARIZERS, PROFILES, RULES

EAGER = {"backend": "eager"}
ON = ["edge_suppression", "background_regularization", "spatial_awareness", "lora_rank_penalty"]


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (4, 6), (3, 2, 3, 3), (5,)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 1) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_every_field_has_a_rule_and_is_documented():
    names = [one.name for one in fields(OptimizerConfig)]
    assert sorted(names) == sorted(RULES)
    told = inspect.getdoc(OptimizerConfig) or ""
    assert [name for name in names if name not in told] == []


BAD: list[tuple[str, Any]] = [
    ("lr", 0),
    ("lr", -1e-4),
    ("lr", float("nan")),
    ("min_lr", -1e-9),
    ("max_lr", 0.0),
    ("lr_bump", 0.0),
    ("warmup_steps", 0),
    ("warmup_steps", 2.5),
    ("eps", (1e-30, 1e-16)),
    ("eps", (0.0, 1e-16, 1e-8)),
    ("betas", (0.9, 0.999)),
    ("betas", (0.9, 1.0, 0.999)),
    ("clip_threshold", 0.0),
    ("eta", 0.0),
    ("beta1_decay", 1.5),
    ("weight_decay", -0.1),
    ("came", 1),
    ("tam_beta", 1.0),
    ("spd_lambda", -1),
    ("spd_anchor", "here"),
    ("momentum", 0.9),
    ("edge_threshold", 0.0),
    ("edge_threshold", 1.0),
    ("edge_penalty", 1.1),
    ("frequency_penalty", -0.1),
    ("detail_preservation", 2),
    ("rank_penalty_strength", -0.01),
    ("low_rank_emphasis", -1),
    ("regularization_interval", 0),
    ("extra_regularizers", [len]),
    ("optim_bits", 16),
    ("block_size", 128),
    ("error_correction", "yes"),
    ("min_8bit_size", -1),
    ("context_window", 1),
    ("stagnation_threshold", 1.0),
    ("adaptation_rate", 1.1),
    ("momentum_scales", []),
    ("bf16_rounding", "up"),
    ("nonfinite", "ignore"),
    ("backend", "gpu"),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_an_impossible_field_is_named(field, value):
    with pytest.raises(ValueError, match=rf"{field}=.* must be"):
        OptimizerConfig(**{field: value})


def test_fields_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"min_lr=0.001 is not below max_lr=0.001"):
        OptimizerConfig(min_lr=1e-3, max_lr=1e-3)
    with pytest.raises(ValueError, match=r"lr_bump=1e-09.*bumps in warmup_steps=10000"):
        OptimizerConfig(lr_bump=1e-9, warmup_steps=10000)
    OptimizerConfig(lr_bump=1e-9, warmup_steps=10000, use_lr_mask=False)


@pytest.mark.parametrize(
    "cls", [family.Automagic_CameAMP, family.Automagic_CameAMP_Improved, RefactoredAutomagicCameAMP]
)
def test_unknown_options_are_told_with_the_nearest(cls):
    with pytest.raises(OptimizerArgumentError, match=r"edge_penalti.*Did you mean 'edge_penalty'"):
        cls(weights(), edge_penalti=0.1)
    with pytest.raises(OptimizerArgumentError, match=r"no profile 'balance'.*'balanced'"):
        cls(weights(), profile="balance")


def test_options_beside_a_config_and_what_is_no_config():
    with pytest.raises(OptimizerArgumentError, match="lr, warmup_steps was given beside a config"):
        RefactoredAutomagicCameAMP(weights(), OptimizerConfig(), lr=1e-4, warmup_steps=5)
    with pytest.raises(OptimizerArgumentError, match=r"not 0.0001; a learning rate is given as lr"):
        RefactoredAutomagicCameAMP(weights(), 1e-4)  # type: ignore[arg-type]


def test_profiles_and_what_wins():
    improved = family.Automagic_CameAMP_Improved
    lean = improved.configured(profile="memory_optimized")
    assert lean.bits == 8
    assert lean.optim_bits == 32
    assert lean.min_8bit_size == 1024
    assert {name: getattr(lean, name) for name in NO_REGULARIZERS} == NO_REGULARIZERS
    rich = improved.configured(profile="quality_optimized", edge_penalty=0.1)
    assert rich.edge_penalty == 0.1, "the default's value, but given"
    assert (rich.frequency_penalty, rich.rank_penalty_strength) == (0.08, 0.02)
    assert all(getattr(rich, name) for name in ON)
    assert improved.configured(profile="balanced") == OptimizerConfig()
    with pytest.raises(OptimizerArgumentError, match=r"There is no profile \['balanced'\]"):
        improved.configured(profile=["balanced"])
    # A profile wins over the class's own defaults.
    assert family.Automagic_CameAMP.configured(profile="quality_optimized").edge_suppression
    assert set(PROFILES) == {"balanced", "memory_optimized", "quality_optimized"}


def test_the_names_differ_in_their_defaults():
    made = {name: getattr(family, name).configured() for name in family.__all__}
    bits = {name for name, config in made.items() if config.bits == 8}
    assert bits == {name for name in made if name.lower().endswith("8bit")}
    assert {name for name, config in made.items() if config.c_optim} == {
        "Automagic_CameAMP_COptim",
        "Automagic_CameAMP_COptim8bit",
    }
    regularized = {name for name, config in made.items() if config.edge_suppression}
    assert regularized == {"Automagic_CameAMP_Improved", "Automagic_CameAMP_Improved_8Bit"}
    assert family.Automagic_CameAMP_8bit is family.Automagic_CameAMP8bit
    told = inspect.signature(family.Automagic_CameAMP8bit).parameters
    assert told["optim_bits"].default == 8
    assert told["edge_suppression"].default is False
    assert told["lr"].default == 1e-6


def test_edge_threshold_is_c_optims_in_its_names():
    c_optim = family.Automagic_CameAMP_COptim.configured(edge_threshold=0.9)
    assert (c_optim.stagnation_threshold, c_optim.edge_threshold) == (0.9, 0.6)
    improved = family.Automagic_CameAMP_Improved.configured(edge_threshold=0.9)
    assert (improved.stagnation_threshold, improved.edge_threshold) == (0.95, 0.9)
    optimizer = family.Automagic_CameAMP_COptim(weights(), edge_threshold=0.9, **EAGER)
    assert optimizer.c_optim is not None
    assert optimizer.c_optim.edge_threshold == 0.9
    assert family.Automagic_CameAMP(weights(), **EAGER).c_optim is None
    with pytest.raises(OptimizerArgumentError, match=r"COptim: edge_threshold=2 is not possible"):
        family.Automagic_CameAMP_COptim(weights(), edge_threshold=2)
    with pytest.raises(OptimizerArgumentError, match="are the same here"):
        family.Automagic_CameAMP_COptim(weights(), edge_threshold=0.9, stagnation_threshold=0.9)


def test_factories_and_both_import_paths():
    plain = importlib.import_module("automagic_cameamp_refactored")
    assert plain.create_lora_optimizer is create_lora_optimizer
    lora = create_lora_optimizer(weights(), warmup_steps=300, spatial_awareness=False, **EAGER)
    assert (lora.config.lr, lora.config.warmup_steps) == (1e-4, 300)
    assert not lora.config.full_finetune
    full = create_full_finetune_optimizer(weights(), **EAGER)
    assert (full.config.lr, full.config.warmup_steps) == (5e-5, 200)
    assert full.config.full_finetune
    assert not full.config.edge_suppression
    assert create_full_finetune_optimizer(weights(), edge_suppression=True).config.edge_suppression


def test_a_config_goes_through_a_checkpoint(tmp_path):
    params = weights()
    config = OptimizerConfig(lr=1e-3, warmup_steps=4, optim_bits=8, min_8bit_size=0, **EAGER)
    optimizer = RefactoredAutomagicCameAMP(params, config)
    train(optimizer, params, 3)
    saved = {"optimizer": optimizer.state_dict(), "config": optimizer.config.__dict__}
    torch.save(saved, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    again = OptimizerConfig(**read["config"])
    assert again == config
    other = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = RefactoredAutomagicCameAMP(other, again)
    resumed.load_state_dict(read["optimizer"])
    train(optimizer, params, 3)
    train(resumed, other, 3)
    assert all(map(torch.equal, params, other))


def test_copies_and_pickles_go_on_alike():
    params = weights()
    optimizer = create_lora_optimizer(params, regularization_interval=1, **EAGER)
    train(optimizer, params)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own = [p for group in twin.param_groups for p in group["params"]]
        train(twin, own)
        assert twin.config == optimizer.config
        assert twin.state[own[0]]["step"] == 2


def test_verbose_prints_a_line_at_every_step(capsys):
    params = weights()
    optimizer = create_lora_optimizer(params, verbose=True, warmup_steps=4, **EAGER)
    train(optimizer, params, 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "RefactoredAutomagicCameAMP step 1 (early_warmup)",
        "RefactoredAutomagicCameAMP step 2 (late_warmup)",
        "RefactoredAutomagicCameAMP step 3 (late_warmup)",
    ]
    assert all("lr 0.0001" in line for line in lines)


class Noting(RegularizationStrategy):
    """Tells what it was called with, and gives ones."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def apply(self, grad: Tensor, **context: Any) -> Tensor:
        self.calls.append((tuple(grad.shape), context))
        return torch.ones_like(grad)


class NotingStacks(Noting):
    batched = True


def test_a_regularizer_of_ones_own_gets_each_gradient_at_its_steps():
    own, stacks = Noting(), NotingStacks()
    params = weights()
    named = [(f"p{k}", p) for k, p in enumerate(params)]
    options = {**NO_REGULARIZERS, **EAGER, "regularization_interval": 3, "warmup_steps": 6}
    optimizer = create_lora_optimizer(named, extra_regularizers=[stacks, own], **options)
    train(optimizer, params, 7)
    steps = [context["step"] for _, context in own.calls]
    assert steps == [1] * 4 + [4] * 4 + [7] * 4
    assert [context["names"] for _, context in own.calls[:4]] == [["p0"], ["p1"], ["p2"], ["p3"]]
    phases = ["early_warmup", "late_warmup", "stable"]
    assert [own.calls[k][1]["phase"] for k in (0, 4, 8)] == phases
    # Those of one shape together, and no vector.
    assert [shape for shape, _ in stacks.calls[:2]] == [(2, 4, 6), (1, 3, 2, 3, 3)]
    assert stacks.calls[0][1]["names"] == ["p0", "p1"]
    assert len(stacks.calls) == 6


def test_what_regularizers_give_is_what_the_step_works_on():
    """The gradients that autograd left stay as they are."""
    params, plain = weights(), weights()
    options = {**NO_REGULARIZERS, **EAGER}
    optimizer = create_lora_optimizer(params, extra_regularizers=[Noting()], **options)
    train(optimizer, params)
    without = create_lora_optimizer(plain, **options)
    for p in plain:
        p.grad = torch.ones_like(p)
    without.step()
    generator = torch.Generator().manual_seed(0)
    for p, one in zip(params, plain, strict=True):
        assert torch.equal(p, one)
        assert torch.equal(p.grad, torch.randn(p.shape, generator=generator))


class Wrong(RegularizationStrategy):
    def __init__(self, gives: Any) -> None:
        self.gives = gives

    def apply(self, grad: Tensor, **context: Any) -> Any:
        return self.gives


GIVEN = [
    (None, "None"),
    (torch.ones(2), r"shape \(2,\)"),
    (torch.ones(4, 4, dtype=torch.complex64), "complex numbers .*"),
]


@pytest.mark.parametrize(("gives", "told"), GIVEN)
def test_a_regularizer_that_gives_something_else_is_named(gives, told):
    params = weights()
    start = [p.detach().clone() for p in params]
    optimizer = create_lora_optimizer(params, extra_regularizers=[Wrong(gives)], **EAGER)
    with pytest.raises(ValueError, match=rf"Wrong.apply has returned {told} for the gradient of"):
        train(optimizer, params)
    assert all(map(torch.equal, params, start)), "nothing has moved"


class Halved(MomentumStrategy):
    def beta1(self, work: Any) -> Any:
        return 0.5 * work.beta1


def test_a_strategy_of_momentum_of_ones_own():
    only = {**NO_REGULARIZERS, "use_tam": False, "use_consistency": False, **EAGER}
    ours, plain = weights(), weights()
    train(create_lora_optimizer(ours, momentum=Halved(), betas=(0.8, 0.9, 0.9), **only), ours, 4)
    train(create_lora_optimizer(plain, betas=(0.4, 0.9, 0.9), **only), plain, 4)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ours, plain, strict=True))
