"""A regularizer of one's own, in ten lines.

    python docs/hina/examples/custom_regularizer.py

It takes the mean out of every gradient, so that the mean of a weight stays where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from torch import Tensor, nn

from library.automagic_cameamp_refactored import (
    OptimizerConfig,
    RefactoredAutomagicCameAMP,
    RegularizationStrategy,
)


class Centred(RegularizationStrategy):
    def apply(self, grad: Tensor, **context: Any) -> Tensor:
        return grad - grad.mean()


def drift(*own: RegularizationStrategy) -> float:
    """How far the mean of a weight's update is from zero, by the size of its elements."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False)
    config = OptimizerConfig(lr=1e-3, regularization_interval=1, extra_regularizers=own)
    optimizer = RefactoredAutomagicCameAMP(layer.parameters(), config)
    start = layer.weight.detach().clone()
    for _ in range(50):
        x = torch.rand(64, 32)
        (layer(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    update = layer.weight.detach() - start
    return float(update.mean().abs() / update.abs().mean())


def main() -> None:
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    without, with_own = drift(), drift(Centred())
    print(f"the mean of the update ÷ its size: {without:.3f}, with the regularizer {with_own:.3f}")
    if not with_own < 0.5 * without:
        sys.exit("The regularizer has not acted.")


if __name__ == "__main__":
    main()
