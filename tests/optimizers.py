"""The optimizers on each backend, and what the tests of their behaviour share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.custom_automagic_cameamp_optimizer import Automagic_CameAMP8bit
from library.custom_hina_adamw_optimizer import HinaAdamWOptimizer
from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.engine import ChainOptimizer

NOTHING_ON: dict[str, Any] = dict.fromkeys(HinaAdamWOptimizer.SWITCHES, False)

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "float32 state": {"optim_bits": 32},
    "8-bit state": {"min_8bit_size": 0},
    "nothing on": {**NOTHING_ON, "optim_bits": 32},
    "nothing on, 8-bit state": {**NOTHING_ON, "min_8bit_size": 0},
    "all on": {"use_orthogonal_grad": True},
    "lr": {"lr": 0.01},
    "no decay": {"weight_decay": 0.0},
    "strong decay": {"weight_decay": 0.1},
    "betas and eps": {"betas": (0.5, 0.9), "eps": 1e-6},
    "no momentum": {"betas": (0.0, 0.9)},
    # Its masks freeze in the middle of most tests, and partners are looked for.
    "adaptive": {
        "cls": AdaptiveHinaAdamW,
        "min_8bit_size": 0,
        "warmup_steps": 3,
        "relationship_discovery_interval": 2,
        "lr_bump": 1e-4,
        "max_lr": 1.0,
    },
    # Its phases end, and its masks freeze, in the middle of most tests.
    "cameamp": {
        "cls": Automagic_CameAMP8bit,
        "lr": 1e-3,
        "min_8bit_size": 0,
        "warmup_steps": 4,
        "lr_bump": 1e-4,
        "max_lr": 1.0,
    },
}

each_case = pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))
each_backend = pytest.mark.parametrize("backend", ["compiled", "eager"])


def hina(
    params: Iterable[Any],
    backend: str,
    cls: type[ChainOptimizer] = HinaAdamWOptimizer,
    **options: Any,
) -> Any:
    """HinaAdamW, or another of the optimizers, on a backend."""
    made: Any = cls
    return made(params, backend=backend, **options)


def named(*tensors: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors with names that tell nothing: every one is a regular parameter."""
    return [(f"p{i}", tensor) for i, tensor in enumerate(tensors)]


def drawn(
    *shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Normally distributed tensors, the same for a seed whatever dtype they or the default have."""
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=noise, dtype=torch.float32).to(dtype) for s in shapes]


def parameters(*tensors: Tensor) -> list[nn.Parameter]:
    """The tensors' values as new parameters, with their strides."""
    return [nn.Parameter(tensor.detach().clone()) for tensor in tensors]


def same(one: Any, other: Any) -> bool:
    """Whether two states, or parts of them, are equal to the last bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def follow(
    optimizers: Sequence[torch.optim.Optimizer],
    params: Sequence[Tensor],
    steps: int = 4,
    change: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    """Step with gradients drawn by seed; the parameters at the end."""
    for step in range(steps):
        grads = drawn(*(tuple(p.shape) for p in params), seed=step + 1)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.to(p.dtype) if p.requires_grad else None
        change(step)
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in params]
