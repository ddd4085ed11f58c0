"""The layers' adapters: LyCORIS's modules, computed beside the base weight instead of through it.

LyCORIS adds ΔW to the base weight and takes the base weight off again. In float16 or bfloat16 that
loses every change smaller than the base weight's own rounding, so a young adapter does nothing.
Here LoRA, LoHa and LoKr act on the input directly, which also costs less and is what lets ordinary
dropout work; the algorithms that do need the base weight see it in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn


class LoRA(LoConModule):
    """ΔW = (alpha / rank)·up·down, with stock's dropouts: of neurons and of ranks, between the two.

    `rank_dropout` draws a mask for each sample and scales what is left by 1 / (1 - rank_dropout).
    With DoRA (`dora_wd`) LyCORIS's own forward is used.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.wd:
            return super().forward(x, *args, **kwargs)
        base = self.org_forward(x, *args, **kwargs)
        if self.training and self.module_dropout and torch.rand(1) < self.module_dropout:
            return base
        return base + self._delta(x)

    def _delta(self, x: Tensor) -> Tensor:
        hidden = self._through(x, self.lora_down)
        if self.tucker:
            hidden = self._through(hidden, self.lora_mid)
        hidden = self.drop(hidden)
        if self.training and self.rank_dropout:
            hidden = hidden * self._rank_mask(hidden)
        return self._through(hidden, self.lora_up) * (self.scalar * (self.scale * self.multiplier))

    @staticmethod
    def _through(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
        """The layer in the input's dtype: what stays float32 is the parameter, not the product."""
        weight = layer.weight.to(x.dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, layer.stride, layer.padding)

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        keep = 1 - self.rank_dropout
        mask = torch.rand(hidden.shape[0], self.lora_dim, device=hidden.device) < keep
        spread = (
            (-1, self.lora_dim, 1, 1)
            if self.isconv
            else (-1, *[1] * (hidden.dim() - 2), self.lora_dim)
        )
        return mask.to(hidden.dtype).view(spread) / keep

    @torch.no_grad()
    def apply_max_norm(self, max_norm: float, device: Any = None) -> tuple[bool, Tensor]:
        """Scale both factors so that ‖ΔW‖ ≤ max_norm, as stock does (not only in the file)."""
        norm = self.make_weight(device).norm() * self.scale
        return _limit(norm, max_norm, [self.lora_down.weight, self.lora_up.weight])


class LoKr(LokrModule):
    """ΔW = (alpha / rank)·w1 ⊗ w2; `rank_dropout` drops rows of ΔW, that is outputs."""

    def bypass_forward_diff(self, h: Tensor, scale: float = 1) -> Tensor:
        delta = super().bypass_forward_diff(h, scale)
        if not (self.training and self.rank_dropout):
            return delta
        rows = torch.rand(self.dim, device=h.device) >= self.rank_dropout
        spread = (1, -1, 1, 1) if self.module_type == "conv2d" else (-1,)
        return delta * rows.to(delta.dtype).view(spread)

    @torch.no_grad()
    def apply_max_norm(self, max_norm: float, device: Any = None) -> tuple[bool, Tensor]:
        """Scale the factors so that ‖ΔW‖ ≤ max_norm, with `scalar`, which LyCORIS leaves out."""
        norm = (self.get_weight(None) * self.scalar).norm()
        factors = [p for name, p in self.named_parameters() if name.startswith("lokr_")]
        return _limit(norm, max_norm, factors)


def _limit(norm: Tensor, max_norm: float, factors: Sequence[Tensor]) -> tuple[bool, Tensor]:
    """Scale `factors` alike so that the `norm` of their product is at most `max_norm`."""
    ratio = float(max_norm / norm) if norm > max_norm else 1.0
    for factor in factors:
        factor.mul_(ratio ** (1 / len(factors)))
    return ratio != 1, norm * ratio


class Full(FullModule):
    """ΔW as it is; once applied, the parameter is W + ΔW, in float32."""

    def load_weight_prehook(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Let a file replace what was there; LyCORIS adds it, rounded to the file's precision."""
        for name, key, base in (
            ("weight", "diff", self._org_weight),
            ("bias", "diff_b", self.org_bias),
        ):
            if prefix + key in state_dict:
                diff = state_dict.pop(prefix + key).float()
                state_dict[prefix + name] = diff if self.is_diff else base[0].to(diff) + diff


class GLoRA(GLoRAModule):
    """ΔW = (alpha / rank)·(W·a1·a2 + b1·b2), with W in float32."""

    @property
    def org_weight(self) -> Tensor:
        return self.org_module[0].weight.float()


# What LyCORIS's names of algorithms stand for here; the others are its own.
OUR_CLASSES: dict[str, type[LycorisBaseModule]] = {
    "lora": LoRA,
    "locon": LoRA,
    "lokr": LoKr,
    "full": Full,
    "glora": GLoRA,
}


def finish(module: LycorisBaseModule, dropout: float = 0.0) -> LycorisBaseModule:
    """Set what LyCORIS's constructors get wrong or lack; every adapter passes through here."""
    if isinstance(module, LoConModule | LohaModule | LokrModule) and not module.wd:
        module.bypass_mode = True
        if dropout:
            module.drop = nn.Dropout(dropout)
    else:
        _see_base_in_float32(module)
    if isinstance(module, NormModule):
        module.rank_dropout = 0  # a norm has no ranks, and LyCORIS's mask keeps what should go
    module.float()
    scale_by_alpha(module)
    return module


def scale_by_alpha(module: LycorisBaseModule) -> None:
    """Let an adapter act by the `alpha` that it holds, and that its file will hold.

    LyCORIS reads alpha only when it makes a module, and gives two whole factors of LoKr, which have
    no scale, the scale √rank with `rs_lora`.
    """
    if isinstance(module, DiagOFTModule | ButterflyOFTModule):
        module.constraint = float(module.alpha) * module.dim
    elif isinstance(module, LokrModule) and module.use_w1 and module.use_w2:
        module.alpha.fill_(module.lora_dim)
        module.scale = 1.0
    elif hasattr(module, "scale"):
        module.scale = float(module.alpha) / module.lora_dim


@torch.no_grad()
def merge_into_layer(module: LycorisBaseModule) -> None:
    """Add an adapter, at its multiplier, to the weight of the layer it was made for.

    LyCORIS's own merge scales LoHa and LoKr by alpha / rank twice.
    """
    layer = module.org_module[0]
    dtype = layer.weight.dtype
    layer.float()
    module.to(layer.weight.device).eval()
    weight, bias = _merged(module)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    layer.to(dtype)


def _merged(module: LycorisBaseModule) -> tuple[Tensor, Tensor | None]:
    base = module.org_module[0].weight
    if isinstance(module, LoConModule):
        delta = module.make_weight() * module.scale
    elif isinstance(module, LohaModule | LokrModule):
        delta = module.get_weight(module.shape) * module.scalar
    else:
        merged: tuple[Tensor, Tensor | None] = module.get_merged_weight(
            module.multiplier, base.shape, base.device
        )
        return merged
    if module.wd:
        return module.apply_weight_decompose(base + delta, module.multiplier), None
    return base + delta * module.multiplier, None


def _see_base_in_float32(module: LycorisBaseModule) -> None:
    """Let W + ΔW - W be computed in float32, then used in the input's dtype."""
    if hasattr(module, "op"):
        module.op = _in_dtype_of_input(module.op)
    current_weight, current_bias = module._current_weight, module._current_bias
    module._current_weight = lambda: current_weight().float()

    def bias_in_float32() -> Tensor | None:
        bias = current_bias()
        return None if bias is None else bias.float()

    module._current_bias = bias_in_float32


def _in_dtype_of_input(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def cast(value: Any) -> Any:
            return value.to(x.dtype) if isinstance(value, Tensor) else value

        return op(x, *map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return call
