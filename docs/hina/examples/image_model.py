"""An image model: a small convolutional denoiser on the pictures that come with the project.

    python docs/hina/examples/image_model.py

All regularizers are on, those of the kernels' spatial axes among them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from library.automagic_cameamp_refactored import OptimizerConfig, RefactoredAutomagicCameAMP

ROOT = Path(__file__).parents[3]
STEPS = 120


def pictures(size: int = 32) -> Tensor:
    """The quickstart's pictures, grey, `[pictures, 1, size, size]` in [-1, 1]."""
    files = sorted((ROOT / "configs" / "quickstart" / "images").glob("*.png"))
    small = [Image.open(file).convert("L").resize((size, size)) for file in files]
    return torch.stack([torch.tensor(np.array(one)) for one in small])[:, None] / 127.5 - 1


def denoiser() -> nn.Sequential:
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 1, 3, padding=1))


def main() -> None:
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    torch.manual_seed(0)
    clean, model = pictures(), denoiser()
    config = OptimizerConfig(
        lr=1e-3,
        max_lr=1e-2,
        lr_bump=3e-5,
        warmup_steps=60,
        full_finetune=True,
        edge_suppression=True,  # against artificial edges
        frequency_penalty=0.08,  # stronger than by default: against high-frequency noise
        spatial_awareness=True,
        background_regularization=True,
    )
    optimizer = RefactoredAutomagicCameAMP(model.named_parameters(), config)
    losses = []
    for step in range(STEPS):
        noisy = clean + 0.5 * torch.randn_like(clean)
        loss = nn.functional.mse_loss(model(noisy), clean)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step + 1:4} ({optimizer.phase}): loss {losses[-1]:.4f}")
    print(f"noise left: {losses[0]:.3f} -> {losses[-1]:.3f} (the noise itself: 0.25)")
    if not losses[-1] < 0.25:
        sys.exit("The denoiser has not learned anything.")


if __name__ == "__main__":
    main()
