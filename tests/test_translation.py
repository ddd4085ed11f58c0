"""Lines that a technique may have, and those that are refused, with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from optimizers import drawn, each_backend, hina, parameters
from torch import Tensor

from library.optim.native.graph import UntranslatableError
from library.optim.state import Kind
from library.optim.techniques import Descent, Technique, Work

SHAPES = ((20, 30), (300,), (5,), (300, 300))  # the last in more than one piece


class OneLine(Technique):
    """A direction from a line."""

    def __init__(self, line: Callable[[Work], Tensor], state: dict[str, Kind] | None = None):
        self.line, self.kept = line, state or {}

    def state(self, role: str, entry: Mapping[str, Any], shape: torch.Size) -> dict[str, Kind]:
        return self.kept

    def apply(self, work: Work) -> None:
        work.u = self.line(work)


def trained(
    backend: str, line: Callable[[Work], Tensor], state: dict[str, Kind] | None = None
) -> Tensor:
    """All parameters after two steps along what a line says."""
    params = parameters(*drawn(*SHAPES))
    named = [(f"{k}.weight", p) for k, p in enumerate(params)]
    optimizer = hina(named, backend, optim_bits=32)
    optimizer.chain = (OneLine(line, state), Descent())
    for step in range(2):
        for p, grad in zip(params, drawn(*SHAPES, seed=step), strict=True):
            p.grad = grad
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


AGREE: dict[str, Callable[[Work], Tensor]] = {
    "sign": lambda w: w.g.sign(),
    "power": lambda w: 2 * w.g**3,
    "number first": lambda w: 1.0 - w.g,
    "exponential": lambda w: torch.exp(-w.g.abs()),
    "larger of two": lambda w: torch.maximum(w.g, w.p),
    "abs of Python": lambda w: abs(w.g),
    "rounded down": lambda w: (3 * w.g).floor(),
    "rounded up": lambda w: (3 * w.g).ceil() * w.spread((w.step / 3).ceil()),
    "whole numbers": lambda w: ((w.g > 0).int() << 3 | 5 & (w.p > 0).int()) - 4 * w.g.abs(),
    "clamped": lambda w: w.g.clamp(-0.5, 0.5),
    "both true": lambda w: torch.where((w.g > 0) & (w.p > 0), w.g, 0.0),
    "truth times number": lambda w: (w.g > 0) * w.g,
    "truth as real": lambda w: w.g * (w.g > 0).float(),
    "truth as whole": lambda w: w.g * (w.g > 0).int(),
    "truth and one": lambda w: w.g * (2 * (w.g > 0) - 1),
    "truth by truth": lambda w: torch.where((w.g > 0) * (w.p > 0), w.g, -w.g),
    "spread truth": lambda w: torch.where(w.spread(w.step > 1), w.g, -w.g),
    "plain number spread": lambda w: w.g * w.spread(w.pace),
    "half of a whole": lambda w: w.g * ((w.g > 0).int() / 2),
    "how many are true": lambda w: w.g * w.spread(w.sum(w.g > 0)),
    "which way all go": lambda w: torch.where(w.spread(w.sum(w.g)) > 0, w.g, -w.g),
    "above the rate": lambda w: torch.where(w.g.abs() > w.spread(w.lr), w.g, 0.0),
    "by the norm": lambda w: w.g / w.spread(w.sum(w.g * w.g)).sqrt(),
    "a sum of a sum": lambda w: w.g - w.spread(w.sum(w.g - w.spread(w.sum(w.g) / w.numel))),
    "since the second step": lambda w: torch.where(w.spread(w.step) > 1, w.g, -w.g),
}


def kept_truth(w: Work) -> Tensor:
    """A mask of more operations than are made twice, needed before and after its own sum."""
    agrees = w.g.abs().sqrt().exp().sqrt().exp() * w.p.abs().sqrt().exp() > 4
    share = w.sum(torch.where(agrees, 1.0, 0.0)) / w.numel
    return torch.where(agrees, w.g * w.spread(share), -w.g)


def keeps_a_sum(w: Work) -> Tensor:
    w.state["kept"] = w.sum(w.g)
    return w.g


def keeps_what_it_did_not_declare(w: Work) -> Tensor:
    w.state["other"] = w.g
    return w.g


def reports_a_matrix(w: Work) -> Tensor:
    w.report["g"] = w.g
    return w.g


def reports_a_number(w: Work) -> Tensor:
    w.report["one"] = 1.0
    return w.g


AGREE["a mask that is kept"] = kept_truth


@pytest.mark.parametrize("line", AGREE.values(), ids=list(AGREE))
def test_both_ways_of_running_a_line_agree(line):
    compiled, eager = (trained(backend, line) for backend in ("compiled", "eager"))
    assert (compiled - eager).abs().max() < 2e-6 * eager.abs().max().clamp_min(1)
    assert (eager - torch.cat([p.flatten() for p in drawn(*SHAPES)])).abs().max() > 1e-4


REFUSED: dict[str, tuple[Callable[[Work], Tensor], str]] = {
    "branch": (lambda w: w.g if w.step > 1 else -w.g, "torch.where.*schedule"),
    "not spread": (lambda w: w.g * w.sum(w.g), "per-tensor quantity meets a matrix.*spread"),
    "not spread where": (lambda w: torch.where(w.step > 1, w.g, 0.0), "meets a matrix"),
    "spread of a matrix": (lambda w: w.g * w.spread(w.p), "spread is for per-tensor quantities"),
    "sum of one number": (lambda w: w.g * w.spread(w.sum(w.spread(w.lr))), "work.numel"),
    "sum of a constant": (lambda w: w.g * w.spread(w.sum(torch.ones(3, 256))), "sum of nothing"),
    "by keyword": (lambda w: w.g.clamp(min=-1), "by position.*clamp"),
    "another type": (lambda w: w.g.to(torch.bfloat16), "no type torch.bfloat16"),
    "square root of a symbol": (lambda w: w.g * math.sqrt(w.step), "functions of `math`"),
    "in place": (lambda w: w.g.mul_(2), r"in place.*test_translation\.py.*mul_"),
    "a sum as state": (keeps_a_sum, "'kept' has to be a matrix.*= w.sum"),
    "report of a matrix": (reports_a_matrix, "'g' has to be a per-tensor quantity"),
    "report of a number": (reports_a_number, "reports 1.0 as 'one'"),
    "no factor": (lambda w: w.g * w.spread(w.factors[OneLine(abs)]), "OneLine asks for a factor"),
}


@each_backend
@pytest.mark.parametrize(("line", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_would_mix_tensors_up_is_refused(backend, line, message):
    with pytest.raises(UntranslatableError, match=message):
        trained(backend, line, {"kept": "signed"})


@pytest.mark.parametrize("line", [lambda w: torch.tanh(w.g), lambda w: w.g.clamp(-1.0)])
def test_what_has_no_translation_is_told_with_its_line(line):
    with pytest.raises(UntranslatableError, match=r"'(tanh|clamp)'.*test_translation.*engine\.md"):
        trained("compiled", line)


@each_backend
def test_state_has_to_be_declared(backend):
    with pytest.raises(ValueError, match=r"keeps 'other' without declaring it"):
        trained(backend, keeps_what_it_did_not_declare)


@each_backend
def test_kinds_of_state_are_checked(backend):
    with pytest.raises(ValueError, match=r"OneLine keeps 'kept' as 'unsigned'.*signed, positive"):
        trained(backend, lambda w: w.g, {"kept": "unsigned"})


@each_backend
@pytest.mark.parametrize("name", ["grad", "p", "step", "noise_key", "lr"])
def test_names_that_are_taken(backend, name):
    with pytest.raises(ValueError, match=f"'{name}'.*choose another"):
        trained(backend, lambda w: w.g, {name: "signed"})
