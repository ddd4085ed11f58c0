"""Full fine-tuning: all weights of a trained classifier learn classes that they have not seen.

    python docs/hina/examples/full_finetune.py

The points of five classes lie on five arms of a spiral. A network learns three of them, then all.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from torch import Tensor, nn

from library.automagic_cameamp_refactored import create_full_finetune_optimizer

CLASSES, STEPS = 5, 200


def points(classes: int, count: int = 512) -> tuple[Tensor, Tensor]:
    arm = torch.randint(classes, (count,))
    radius = 0.2 + torch.rand(count)
    angle = 2 * torch.pi * arm / CLASSES + 2 * radius + 0.1 * torch.randn(count)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), arm


def pretrained() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        x, arm = points(3)
        nn.functional.cross_entropy(model(x), arm).backward()
        adam.step()
        adam.zero_grad()
    return model


def accuracy(model: nn.Module) -> float:
    x, arm = points(CLASSES, 2000)
    return float((model(x).argmax(1) == arm).float().mean())


def main() -> None:
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    torch.manual_seed(0)
    model = pretrained()
    before = accuracy(model)
    # Whole weights are pulled back towards where they began, not to zero (full_finetune).
    optimizer = create_full_finetune_optimizer(
        model.named_parameters(), lr=1e-3, warmup_steps=100, max_lr=1e-2, lr_bump=3e-5
    )
    for step in range(STEPS):
        x, arm = points(CLASSES)
        loss = nn.functional.cross_entropy(model(x), arm)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 40 == 0 or step == STEPS - 1:
            print(f"step {step + 1:4} ({optimizer.phase}): loss {loss.item():.4f}")
    after = accuracy(model)
    print(f"right of all five classes: {before:.0%} -> {after:.0%}")
    if not after > before + 0.2:
        sys.exit("The network has not learned the new classes.")


if __name__ == "__main__":
    main()
