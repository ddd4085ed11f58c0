"""A network module of somebody else's: LoKr and norms, one group, the oldest signature."""

import torch
from torch import nn


class LoKrModule(nn.Module):
    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.lokr_w1 = nn.Parameter(torch.randn(4, 4))
        if whole:
            self.lokr_w2 = nn.Parameter(torch.zeros(4, 6))
        else:
            self.lokr_w2_a = nn.Parameter(torch.randn(4, 2))
            self.lokr_w2_b = nn.Parameter(torch.zeros(2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w2 = self.lokr_w2 if hasattr(self, "lokr_w2") else self.lokr_w2_a @ self.lokr_w2_b
        return x @ torch.kron(self.lokr_w1, w2).T


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lycoris_blocks_0 = LoKrModule(whole=True)
        self.lycoris_blocks_1 = LoKrModule(whole=False)
        self.lycoris_norm = nn.Module()
        self.lycoris_norm.w_norm = nn.Parameter(torch.ones(16))
        self.lycoris_norm.b_norm = nn.Parameter(torch.zeros(16))
        self.outside = [nn.Parameter(torch.ones(16))]  # no parameter of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lycoris_blocks_0(x) + self.lycoris_blocks_1(x)
        return y * self.lycoris_norm.w_norm * self.outside[0] + self.lycoris_norm.b_norm

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        return (param for param in [*self.parameters(), *self.outside])


def create_network(**arguments) -> Network:
    return Network()
