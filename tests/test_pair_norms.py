"""ALLoRA's norms: computed where a pair's halves are worked on, wherever these lie."""

from __future__ import annotations

import pytest
import torch
from optimizers import drawn, each_backend, hina, parameters
from torch import nn

from library.optim.native.pairs import order_of
from library.optim.roles import LoRAPair

NAME = "lora_unet_x"
LARGE = 600_000  # elements: more than one thread's share


def pair(rank: int, wide_in: int, wide_out: int, dtype=torch.float32) -> tuple[nn.Parameter, ...]:
    drawing = torch.Generator().manual_seed(rank)
    shapes = (rank, wide_in), (wide_out, rank)
    return tuple(
        nn.Parameter(torch.randn(shape, generator=drawing).to(dtype) * 0.3) for shape in shapes
    )


def lrs(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The effective learning rate of each half in the last step, by role."""
    return {
        role: float(lr)
        for record in optimizer.last_step
        for role, lr in zip(record.roles, record.values["effective_lr"], strict=True)
    }


def expected(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    norm = (b.double().flatten(1) @ a.double().flatten(1)).norm(dim=1).mean()
    scale = 1e-3 / (1 + float(norm))
    return {"lora_a": scale, "lora_b": scale * 21}


@each_backend
@pytest.mark.parametrize(
    ("rank", "wide_in", "wide_out"),
    [(3, 7, 5), (16, 64, 40), (17, 33, 130), (64, 100, 90), (8, LARGE // 8, 5), (4, 5, LARGE // 4)],
)
@pytest.mark.parametrize("arrangement", ["a first", "b first", "two groups"])
def test_the_norm_of_a_pair(backend, rank, wide_in, wide_out, arrangement):
    a, b = pair(rank, wide_in, wide_out)
    other = nn.Parameter(torch.ones(9))
    named = [(f"{NAME}.lora_down.weight", a), (f"{NAME}.lora_up.weight", b)]
    if arrangement == "b first":
        named.reverse()
    groups = [[*named, ("bias", other)]]
    if arrangement == "two groups":
        groups = [[named[0], ("bias", other)], [named[1]]]
    optimizer = hina([{"params": group} for group in groups], backend)
    want = expected(a.detach(), b.detach())
    for p in (a, b, other):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert lrs(optimizer) == pytest.approx({**want, "regular": 1e-3}, rel=1e-5)


@each_backend
@pytest.mark.parametrize("missing", ["a", "b"])
def test_a_half_without_gradient_counts_in_the_norm(backend, missing):
    a, b = pair(4, 20, 10)
    optimizer = hina([(f"{NAME}.lora_down.weight", a), (f"{NAME}.lora_up.weight", b)], backend)
    want = expected(a.detach(), b.detach())
    half = a if missing == "b" else b
    half.grad = torch.ones_like(half)
    optimizer.step()
    role = "lora_a" if missing == "b" else "lora_b"
    assert lrs(optimizer) == pytest.approx({role: want[role]}, rel=1e-5)


@each_backend
def test_halves_of_two_types(backend):
    a, b = pair(4, 20, 10)
    b = nn.Parameter(b.detach().bfloat16())
    optimizer = hina([(f"{NAME}.lora_down.weight", a), (f"{NAME}.lora_up.weight", b)], backend)
    want = expected(a.detach(), b.detach())
    for p in (a, b):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert lrs(optimizer) == pytest.approx(want, rel=1e-5)


@each_backend
def test_half_precision_with_gaps(backend):
    a, b = (
        nn.Parameter(torch.stack([half, half], -1)[..., 0])
        for half in pair(4, 20, 10, torch.bfloat16)
    )
    optimizer = hina([(f"{NAME}.lora_down.weight", a), (f"{NAME}.lora_up.weight", b)], backend)
    want = expected(a.detach(), b.detach())
    for p in (a, b):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not a.is_contiguous()
    assert lrs(optimizer) == pytest.approx(want, rel=1e-5)


def large_pairs(backend: str, threads: int) -> list[torch.Tensor]:
    """Tensors that threads share, that are a task of their own, and small ones, after three steps
    in which half of each gradient is zero."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    shapes = [(16, 40_000), (300, 16), (16, 300), (9_000, 16), (1100, 600), (300, 300), (7,)]
    params = parameters(*drawn(*shapes))
    names = ["a.lora_down", "a.lora_up", "b.lora_down", "b.lora_up", "c", "d", "e"]
    optimizer = hina(zip(names, params, strict=True), backend, optim_bits=32)
    for step in range(3):
        for p, grad in zip(params, drawn(*shapes, seed=step + 1), strict=True):
            p.grad = grad * (grad > 0)
        optimizer.step()
    torch.set_num_threads(before)
    return [p.detach() for p in params]


def test_large_tensors_and_threads():
    one, two, eager = (
        large_pairs("compiled", 1),
        large_pairs("compiled", 2),
        large_pairs("eager", 1),
    )
    for p, q, r in zip(one, two, eager, strict=True):
        assert torch.equal(p, q)
        assert (p - r).abs().max() < 1e-5


def test_halves_are_neighbours_in_the_order():
    some = [nn.Parameter(torch.zeros(4, 4)) for _ in range(7)]
    pairs = [LoRAPair("x", some[0], some[5], None), LoRAPair("y", some[4], some[3], None)]
    cut = [LoRAPair("z", some[1], nn.Parameter(torch.zeros(4, 4)), None)]
    tucker = [LoRAPair("t", some[1], some[2], nn.Parameter(torch.zeros(4, 4, 1, 1)))]
    order = order_of(some, [*pairs, *cut, *tucker])
    assert order.tensors.tolist() == [6, 5, 0, 4, 3, 2, 1]
    assert order.ranks.tolist() == [0, -4, 0, 4, 0, 0, 0]
    assert order.pairs == {0, 1}
