"""The CameAMP chain once more in float64, as spec 1 §5 and the techniques' papers say."""

from __future__ import annotations

import math
from typing import Any

import torch
from lr_masks import Limits, MaskReference
from torch import Tensor

from library.optim.cameamp import CameAMP
from library.optim.cameamp_config import NO_REGULARIZERS, OptimizerConfig

NOTHING_ON: dict[str, Any] = {**dict.fromkeys(CameAMP.SWITCHES, False), **NO_REGULARIZERS}
"""Every part switched off: Adam, without bias correction's exceptions."""

ONLY_CAME: dict[str, Any] = {**NOTHING_ON, "came": True}

SHAPES = {
    "wide": (8, 37),
    "tall": (37, 8),
    "square": (24, 24),
    "vector": (40,),
    "kernels": (6, 5, 3, 3),
    "points": (9, 7, 1, 1),
    "sequence": (4, 6, 5),
    "one": (1,),
}


def drawn(seed: int, size: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Average:
    """The average of a positive matrix from rows and columns over the last two axes; of a vector,
    of each element."""

    def __init__(self, shape: torch.Size) -> None:
        self.factored = len(shape) > 1
        if self.factored:
            self.row = torch.zeros(shape[:-1], dtype=torch.float64)
            self.column = torch.zeros((*shape[:-2], shape[-1]), dtype=torch.float64)
        else:
            self.whole = torch.zeros(shape, dtype=torch.float64)

    def take(self, x: Tensor, beta: float) -> Tensor:
        """Take x in; the average of each element as it is estimated then."""
        if not self.factored:
            self.whole = beta * self.whole + (1 - beta) * x
            return self.whole
        self.row = beta * self.row + (1 - beta) * x.mean(-1)
        self.column = beta * self.column + (1 - beta) * x.mean(-2)
        share = self.row / self.row.mean(-1, keepdim=True)
        return share.unsqueeze(-1) * self.column.unsqueeze(-2)


class Parameter:
    """One tensor's way through the chain."""

    def __init__(self, p: Tensor, config: OptimizerConfig) -> None:
        self.config = config
        self.p = p.double()
        self.start = self.p.clone()
        self.m = torch.zeros_like(self.p)
        self.alignment = 0.0
        self.second, self.residual = Average(p.shape), Average(p.shape)
        limits = Limits(config.lr_bump, config.min_lr, config.max_lr)
        self.mask = MaskReference(limits, config.warmup_steps)
        self.t = 0

    def step(self, grad: Tensor, lr: float) -> None:
        self.t += 1
        config, n = self.config, self.p.numel()
        early = self.t < config.warmup_steps / 2
        grad = grad.double()
        g = grad
        if config.use_agr and n > 1:
            g = g * (1 - g.abs() / g.abs().sum())
        if config.use_orthogonal_grad and early and n > 1:
            turned = g - (self.p * g).sum() / (self.p * self.p).sum() * self.p
            g = turned * g.norm() / turned.norm()
        u = self.direction(g, early)
        decay = config.beta1_decay**self.t
        if config.use_grams and early:
            u = (1 - decay) * u + decay * u.abs() * g.sign()
        if config.use_cautious and not early:
            agrees = (u * g > 0).double()
            u = u * agrees * n / (agrees.sum() + 1)
        if config.use_row_scaling and not config.full_finetune:
            norms = self.p.flatten(1).norm(dim=1) if self.p.ndim > 1 else self.p.abs()
            scale = (norms + 1 / config.eta**2).rsqrt()
            u = u * scale.view(-1, *[1] * (self.p.ndim - 1))
        if config.use_lr_mask:
            self.mask.advance(grad, lr)
            u = u * self.mask.factor(lr)
        theta = self.theta(grad) if config.adaptive_weight_decay else 1.0
        new = self.p - lr * u - lr * config.weight_decay * theta * self.p
        self.p = self.pulled_back(grad, new) if config.use_spd else new

    def direction(self, g: Tensor, early: bool) -> Tensor:
        config = self.config
        beta1, beta2, beta3 = config.betas
        beta, damping = beta1, 1.0
        if early and config.use_tam:
            norms = self.m.norm() * g.norm()
            cosine = float((self.m * g).sum() / norms) if norms > 0 else 0.0
            self.alignment = config.tam_beta * self.alignment + (1 - config.tam_beta) * cosine
            damping = (1 + self.alignment) / 2 + config.eps[2]
        if not early and config.use_consistency:
            beta = max(beta1 * config.beta1_decay**self.t, 0.4)
        if not config.came:
            self.m = beta * self.m + (1 - beta) * damping * g
            v = self.second.take_plain(g * g, beta2)
            corrected = self.m / (1 - beta1**self.t)
            return corrected / ((v / (1 - beta2**self.t)).sqrt() + config.eps[2])
        normalised = g / self.second.take(g * g + config.eps[0], beta2).sqrt()
        rms = normalised.norm() / math.sqrt(g.numel())
        normalised = normalised / max(1.0, float(rms) / config.clip_threshold)
        self.m = beta * self.m + (1 - beta) * damping * normalised
        if g.ndim < 2:
            return self.m
        apart = (normalised - self.m) ** 2 + config.eps[1]
        return self.m / self.residual.take(apart, beta3).sqrt()

    def theta(self, grad: Tensor) -> Tensor:
        size = grad.abs()
        spread = size.std(correction=0)
        z = (size - size.mean()) / spread if spread > 1e-6 * size.max() else 0 * size
        return 2 / (1 + (-z).exp())

    def pulled_back(self, grad: Tensor, new: Tensor) -> Tensor:
        anchor = {"auto": "initial" if self.config.full_finetune else "zero"}
        kind = anchor.get(self.config.spd_anchor, self.config.spd_anchor)
        origin = self.start if kind == "initial" else torch.zeros_like(self.p)
        if (grad * (self.p - origin)).sum() <= 0:
            return new
        after, before = (new - origin).norm(), (self.p - origin).norm()
        r = ((after - before) / after).clamp(0, 1)
        return new - self.config.spd_lambda * r * (new - origin)
