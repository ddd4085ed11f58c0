"""What the optimizers are measured on: the tensors of an SDXL LoRA, with random gradients."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

MODULES = Path(__file__).parent.parent / "tests" / "data" / "sdxl_lora_modules.json"
RANK = 16
GRADIENT_SIZE = 1e-3  # standard deviation; a parameter's is 20 times as much
NOISE = 1 << 22  # floats, of which every tensor copies a window

Shapes = dict[str, tuple[int, int]]  # by the parameter's name


def sdxl_lora(modules: int | None = None) -> Shapes:
    """Both halves of each of SDXL's 986 linear modules, or of `modules` drawn from them."""
    listed: list[tuple[str, int, int]] = json.loads(MODULES.read_text("utf-8"))
    return lora_of(listed if modules is None else _shuffled(listed)[:modules])


def sdxl_lora_of_size(parameters: float) -> Shapes:
    """Modules drawn from SDXL's, as many times over as it takes, of `parameters` in all."""
    listed = _shuffled(json.loads(MODULES.read_text("utf-8")))
    drawn: list[tuple[str, int, int]] = []
    size = 0
    for name, wide_in, wide_out in cycle(listed):
        if size >= parameters:
            return lora_of(drawn)
        turn = len(drawn) // len(listed)
        drawn.append((f"{name}_copy{turn}" if turn else name, wide_in, wide_out))
        size += RANK * (wide_in + wide_out)
    raise AssertionError("cycle ends only where there is no module")


def lora_in_tensors(count: int, parameters: float) -> Shapes:
    """A LoRA of `count` tensors, all of one size, with about `parameters` in all."""
    width = max(1, round(parameters / count / RANK))
    return lora_of([(f"lora_unet_blocks_{i}", width, width) for i in range(count // 2)])


def lora_of(modules: Sequence[tuple[str, int, int]]) -> Shapes:
    """The tensors of a LoRA on linear modules (name, width in, width out)."""
    shapes: Shapes = {}
    for name, wide_in, wide_out in modules:
        shapes[f"{name}.lora_down.weight"] = (RANK, wide_in)
        shapes[f"{name}.lora_up.weight"] = (wide_out, RANK)
    return shapes


def size_of(shapes: Shapes) -> int:
    return sum(rows * columns for rows, columns in shapes.values())


class Workload:
    """Tensors of given shapes: any number of copies of the parameters, which share one gradient.

    All tensors are float32 and each is an allocation of its own, as a network's are. None is zero,
    though half of a fresh LoRA is: some techniques have less to do there.
    """

    def __init__(self, shapes: Shapes, device: str = "cpu") -> None:
        self.shapes = shapes
        self.parameters = size_of(shapes)
        self.device = torch.device(device)
        self._draw = random.Random(0)
        generator = torch.Generator(self.device).manual_seed(0)
        self._noise = torch.randn(NOISE, device=self.device, generator=generator) * GRADIENT_SIZE
        self.gradients = {name: torch.empty(shape, device=self.device) for name, shape in self._all}
        self.new_gradients()

    @property
    def _all(self) -> list[tuple[str, tuple[int, int]]]:
        return list(self.shapes.items())

    def new_parameters(self) -> dict[str, Parameter]:
        """A copy of the parameters for one optimizer, with the common gradients on it."""
        parameters = {name: Parameter(self._random(shape) * 20) for name, shape in self._all}
        self.give_gradients(parameters)
        return parameters

    def give_gradients(self, parameters: dict[str, Parameter], missing: float = 0.0) -> None:
        """Every parameter its gradient, but None to a share `missing` of them, drawn anew."""
        for name, parameter in parameters.items():
            parameter.grad = None if self._draw.random() < missing else self.gradients[name]

    def new_gradients(self) -> None:
        """Other values, as after a backward pass; also puts right what an optimizer did to them."""
        fresh = [self._random(shape) for _, shape in self._all]
        torch._foreach_copy_(list(self.gradients.values()), fresh)

    def _random(self, shape: tuple[int, int]) -> Tensor:
        size = shape[0] * shape[1]
        start = self._draw.randrange(NOISE - size)
        return self._noise[start : start + size].view(shape)


def _shuffled(modules: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """So that any part of the list has small and large modules as the whole has."""
    return random.Random(0).sample(modules, len(modules))
