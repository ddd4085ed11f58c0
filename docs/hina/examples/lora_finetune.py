"""LoRA on a trained network: only two thin matrices for each layer learn something new.

    python docs/hina/examples/lora_finetune.py

A small network learns the sine, then its weights are frozen and a LoRA turns it into a cosine.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from torch import Tensor, nn

from library.automagic_cameamp_refactored import create_lora_optimizer

STEPS = 200


class LoRALinear(nn.Module):
    """A frozen layer and what is added to it: up·down·x, zero at first."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.lora_up(self.lora_down(x))


def batch() -> Tensor:
    return 6 * torch.rand(256, 1) - 3


def pretrained() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(500):
        x = batch()
        nn.functional.mse_loss(model(x), x.sin()).backward()
        adam.step()
        adam.zero_grad()
    return model


def main() -> None:
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    torch.manual_seed(0)
    model = pretrained()
    for k in (2, 4):
        model[k] = LoRALinear(model[k])
    adapter = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
    # The learning rate of each element may rise to max_lr, by lr_bump a step until warmup_steps.
    optimizer = create_lora_optimizer(adapter, lr=1e-3, warmup_steps=100, max_lr=1e-2, lr_bump=3e-5)
    losses = []
    for step in range(STEPS):
        x = batch()
        loss = nn.functional.mse_loss(model(x), x.cos())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 40 == 0 or step == STEPS - 1:
            print(f"step {step + 1:4} ({optimizer.phase}): loss {losses[-1]:.4f}")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, bytes held {optimizer.get_memory_stats()}")
    if not losses[-1] < 0.5 * losses[0]:
        sys.exit("The adapter has not learned the cosine.")


if __name__ == "__main__":
    main()
