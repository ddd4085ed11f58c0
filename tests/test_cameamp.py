"""The CameAMP chain against its definition, part by part and whole, over all phases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from came_pytorch import CAME as Published
from cameamp_reference import NOTHING_ON, ONLY_CAME, SHAPES, Parameter, drawn
from optimizers import each_backend
from torch import Tensor, nn

from library.custom_automagic_cameamp_optimizer import Automagic_CameAMP, Automagic_CameAMP8bit
from library.optim.cameamp_config import OptimizerConfig

STEPS, WARMUP = 45, 20  # early until 10, late until 20, stable until 40

PARTS: dict[str, dict[str, Any]] = {
    "came": {},
    "agr": {"use_agr": True},
    "orthogonal": {"use_orthogonal_grad": True},
    "torque": {"use_tam": True},
    "grams": {"use_grams": True},
    "consistency": {"use_consistency": True},
    "cautious": {"use_cautious": True},
    "row scaling": {"use_row_scaling": True},
    "mask": {"use_lr_mask": True},
    "adaptive decay": {"adaptive_weight_decay": True, "weight_decay": 0.5},
    "spd": {"use_spd": True, "spd_lambda": 0.5},
    "spd from the start": {"use_spd": True, "spd_lambda": 0.5, "spd_anchor": "initial"},
    "all": dict.fromkeys(NOTHING_ON.keys() - {"c_optim", "frequency_penalty"}, True),
    "full fine-tuning": {"use_row_scaling": True, "use_spd": True, "full_finetune": True},
}


def options_of(part: str) -> dict[str, Any]:
    on = {**ONLY_CAME, "warmup_steps": WARMUP, "lr_bump": 1e-4, "min_lr": 1e-4, "max_lr": 2e-2}
    on |= {"beta1_decay": 0.97, **PARTS[part]}
    return {**on, **{name: False for name in on if name in _REGULARIZERS}}


_REGULARIZERS = (
    "edge_suppression",
    "background_regularization",
    "spatial_awareness",
    "lora_rank_penalty",
)


def lr_at(step: int) -> float:
    """It rises, so that masks follow, and falls behind the warm-up."""
    return 5e-3 * min(1.0, step / 5) * (1.0 if step < 30 else 0.7)


def trained(backend: str, options: dict[str, Any], steps: int = STEPS) -> dict[str, Tensor]:
    params = {name: nn.Parameter(p) for name, p in drawn(0, 0.1).items()}
    optimizer = Automagic_CameAMP(list(params.items()), backend=backend, **options)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr_at(step)
        for name, grad in drawn(step, 1e-2).items():
            params[name].grad = grad
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


# As machine code only what has most in it: each is half a dozen programs to compile.
BOTH = [("eager", part) for part in PARTS]
BOTH += [("compiled", part) for part in ("all", "spd from the start", "full fine-tuning")]


@pytest.mark.parametrize(("backend", "part"), BOTH)
def test_each_part_follows_its_definition_through_all_phases(backend, part):
    options = options_of(part)
    found = trained(backend, options)
    config = OptimizerConfig(**options)
    start = drawn(0, 0.1)
    references = {name: Parameter(p, config) for name, p in start.items()}
    for step in range(1, STEPS + 1):
        for name, grad in drawn(step, 1e-2).items():
            references[name].step(grad, lr_at(step))
    for name, reference in references.items():
        moved = (reference.p - start[name]).abs().max()
        error = (found[name].double() - reference.p).abs().max()
        assert error <= 2e-4 * moved + 1e-6, name


@pytest.mark.parametrize("part", [part for part in PARTS if part != "came"])
def test_each_part_changes_something(part):
    """The part is seen: without it the trajectory is another."""
    alone, with_part = trained("eager", options_of("came")), trained("eager", options_of(part))
    assert any((alone[name] - p).abs().max() > 1e-4 for name, p in with_part.items())


@each_backend
def test_came_alone_equals_came_pytorch(backend):
    """Over a hundred steps to float32's rounding, on matrices, vectors and convolutions."""
    shapes = [*SHAPES.values(), (2048, 8), (12, 600), (60, 4), (7, 2), (16, 3, 2, 2), (1, 9)]
    shapes += [(1030, 700)] if backend == "compiled" else []  # more than half a million: in bands
    generator = torch.Generator().manual_seed(0)
    start = [0.1 * torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    same = {"betas": (0.9, 0.999, 0.9999), "weight_decay": 0.01}
    optimizer = Automagic_CameAMP(ours, lr=1e-3, backend=backend, **ONLY_CAME, **same)
    published = Published(theirs, lr=1e-3, eps=(1e-30, 1e-16), **same)
    for _ in range(100):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = 1e-2 * torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        published.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        moved = (q - before).abs().max()
        assert (p - q).abs().max() <= 4e-5 * moved + 6e-8, tuple(p.shape)


def test_a_learning_rate_above_the_masks_limit_is_told(caplog):
    group = {"params": [nn.Parameter(torch.ones(3, 3))], "lr": 1e-2}
    Automagic_CameAMP([group], lr=1e-4, backend="eager")
    assert "lr_mask holds the learning rate, 0.01, down to max_lr=0.001" in caplog.text
    caplog.clear()
    Automagic_CameAMP([group], lr=1e-4, backend="eager", use_lr_mask=False)
    assert not caplog.text


def test_without_came_it_is_adamw():
    options = {**NOTHING_ON, "betas": (0.9, 0.99, 0.999), "weight_decay": 0.1, "lr": 1e-2}
    ours = {name: nn.Parameter(p) for name, p in drawn(0, 0.1).items()}
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    optimizer = Automagic_CameAMP(ours.items(), **options)
    adamw = torch.optim.AdamW(theirs.values(), 1e-2, (0.9, 0.99), weight_decay=0.1)
    for step in range(10):
        for name, grad in drawn(step, 1e-2).items():
            ours[name].grad, theirs[name].grad = grad, grad.clone()
        optimizer.step()
        adamw.step()
    for name, p in ours.items():
        assert (p - theirs[name]).abs().max() < 1e-6


def test_a_large_tensor_does_not_depend_on_the_number_of_threads():
    def after(threads: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        p = nn.Parameter(torch.randn(1030, 700, generator=torch.Generator().manual_seed(0)))
        optimizer = Automagic_CameAMP8bit([p], lr=1e-3, warmup_steps=4)
        for step in range(5):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        torch.set_num_threads(before)
        return p.detach()

    assert torch.equal(after(1), after(2))


def test_neighbours_and_groups_change_no_bit():
    def after(*groups: list[str]) -> dict[str, Tensor]:
        params = {name: nn.Parameter(p) for name, p in drawn(0, 0.1).items()}
        chosen = [{"params": [(name, params[name]) for name in group]} for group in groups]
        optimizer = Automagic_CameAMP8bit(chosen, lr=1e-3, warmup_steps=4, min_8bit_size=0)
        for step in range(6):
            for name, grad in drawn(step, 1e-2).items():
                params[name].grad = grad
            optimizer.step()
        return {name: params[name].detach() for group in groups for name in group}

    whole = after(list(SHAPES))
    for name, p in {**after(["tall"], ["kernels", "vector"]), **after(["wide"])}.items():
        assert torch.equal(p, whole[name]), name
