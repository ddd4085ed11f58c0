"""Models that multiply their parameters with one another: adapters, and networks without one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW

WIDTHS = ((24, 32), (32, 32), (40, 24))  # of rows and columns; several layers of each


class LoRA(nn.Sequential):
    """up(down(x)) of a linear layer, or of a 3x3 convolution; up starts at zero."""

    def __init__(self, rows: int, columns: int, rank: int, conv: bool, dropout: float) -> None:
        super().__init__()
        if conv:
            self.lora_down: nn.Module = nn.Conv2d(columns, rank, 3, padding=1, bias=False)
            self.dropout = nn.Dropout(dropout)
            self.lora_up: nn.Module = nn.Conv2d(rank, rows, 1, bias=False)
        else:
            self.lora_down = nn.Linear(columns, rank, bias=False)
            self.dropout = nn.Dropout(dropout)
            self.lora_up = nn.Linear(rank, rows, bias=False)
        nn.init.zeros_(self.lora_up.weight)


class LoKr(nn.Module):
    """x·(w1 ⊗ (w2_a·w2_b))ᵀ; w2_b starts at zero."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.lokr_w1 = nn.Parameter(torch.randn(2, 2))
        self.lokr_w2_a = nn.Parameter(torch.randn(rows // 2, rank) / rank**0.5)
        self.lokr_w2_b = nn.Parameter(torch.zeros(rank, columns // 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.kron(self.lokr_w1, self.lokr_w2_a @ self.lokr_w2_b).mT


class Adapter(nn.Module):
    """Layers of repeated equal shapes that learn teachers of rank 4 and of various sizes. Layers
    of one width share their inputs, as the projections of an attention block do."""

    def __init__(
        self,
        algo: str = "lora",
        rank: int = 4,
        repeats: int = 4,
        dropout: float = 0.0,
        one_teacher: bool = False,
        widths: Sequence[tuple[int, int]] = WIDTHS,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = algo == "conv"
        self.layers, self.widths = nn.ModuleList(), list(widths) * repeats
        self.teachers = []
        for rows, columns in self.widths:
            layer = (
                LoKr(rows, columns, rank)
                if algo == "lokr"
                else LoRA(rows, columns, rank, self.conv, dropout)
            )
            self.layers.append(layer)
            if not one_teacher or len(self.teachers) < len(widths):
                size = 10 ** float(torch.rand(1) - 1)
                left, right = torch.randn(rows, 4), torch.randn(4, columns)
                self.teachers.append(left @ right * (size / columns**0.5))
        self.teachers = (self.teachers * repeats)[: len(self.widths)]

    def loss(self, seed: int) -> Tensor:
        """Of a batch drawn by the seed."""
        draw = torch.Generator().manual_seed(seed)
        inputs: dict[int, Tensor] = {}
        total = torch.zeros(())
        for layer, teacher, (_, columns) in zip(
            self.layers, self.teachers, self.widths, strict=True
        ):
            if columns not in inputs:
                shape = (2, columns, 5, 5) if self.conv else (12, columns)
                inputs[columns] = torch.randn(shape, generator=draw)
            x = inputs[columns]
            wanted = torch.einsum("oi,bi...->bo...", teacher, x)
            total = total + (layer(x) - wanted).square().mean()
        return total

    def partners(self) -> dict[str, str]:
        """Each factor's true partner, by name."""
        found = {}
        for name, _ in self.named_parameters():
            for one, other in (("lora_down", "lora_up"), ("lokr_w2_a", "lokr_w2_b")):
                if one in name:
                    found[name] = name.replace(one, other)
                    found[found[name]] = name
        return found


class Attention(nn.Module):
    """Attention with separate projections without biases, and its residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            each(normed).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for each in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """A hidden layer without biases, and its residual connection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rise = nn.Linear(width, hidden, bias=False)
        self.fall = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fall(self.rise(self.norm(x)).relu())


class Transformer(nn.Module):
    """It learns to tell of each token the one that stood before it."""

    TOKENS = 12

    def __init__(self, width: int = 24, hidden: int = 48, heads: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Embedding(self.TOKENS, width)
        self.place = nn.Embedding(8, width)
        self.attention, self.perceptron = Attention(width, heads), Perceptron(width, hidden)
        self.head = nn.Linear(width, self.TOKENS)

    def loss(self, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.TOKENS, (16, 8), generator=draw)
        x = self.token(tokens) + self.place(torch.arange(8))
        logits = self.head(self.perceptron(self.attention(x)))
        return functional.cross_entropy(
            logits[:, 1:].flatten(0, 1).float(), tokens[:, :-1].flatten()
        )

    PARTNERS = (
        ("attention.q.weight", "attention.k.weight", "Pᵀ·Q"),
        ("attention.o.weight", "attention.v.weight", "P·Q"),
        ("perceptron.fall.weight", "perceptron.rise.weight", "P·Q"),
    )


class ConvNet(nn.Module):
    """It tells which of four waves is in a picture; a branch reads the picture's rows alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 40, 3, padding=1, bias=False)
        self.point = nn.Conv2d(40, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.rows = nn.Conv1d(8, 36, 3, padding=1, bias=False)
        self.rows_point = nn.Conv1d(36, 8, 1, bias=False)
        self.head = nn.Linear(16 + 8, 4)

    def loss(self, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        kind = torch.randint(4, (24,), generator=draw)
        noise = torch.randn(24, 8, 8, generator=draw)
        x = (waves()[kind] + 0.5 * noise).to(self.conv.weight.dtype)
        seen = self.norm(self.point(self.conv(x.unsqueeze(1)).relu())).relu().mean((2, 3))
        rows = self.rows_point(self.rows(x).relu()).mean(2)
        return functional.cross_entropy(self.head(torch.cat([seen, rows], 1)).float(), kind)

    PARTNERS = (
        ("point.weight", "conv.weight", "P·Q"),
        ("rows_point.weight", "rows.weight", "P·Q"),
    )


def waves() -> Tensor:
    """`[4, 8, 8]`: along the rows and the columns, short and long."""
    line = torch.stack([torch.sin(torch.arange(8) * pace) for pace in (0.8, 2.4)])
    along = line.unsqueeze(1).expand(2, 8, 8)
    return torch.cat([along, along.mT])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0
) -> Iterator[float]:
    """Steps on batches drawn anew; the loss of each, before it."""
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        loss = model.loss(seed)
        loss.backward()
        yield float(loss.detach())
        optimizer.step()


def partners_of(optimizer: AdaptiveHinaAdamW, model: nn.Module) -> dict[str, tuple[str, str]]:
    """Each parameter's partner and their product, as reported, by the names that the model knows;
    the optimizer holds the model's parameters in the model's order."""
    names = [name for name, _ in model.named_parameters()]
    found = defaultdict(list)
    for one in optimizer.get_relationship_summary()["relationships"]:
        partner = names[one["partner_index"]], one["interaction_type"]
        found[names[one["param_index"]]].append(partner)
    return {name: partner for name, (partner,) in found.items()}
