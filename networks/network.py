"""The network: all adapters of a model, with the methods that stock calls."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lycoris.modules.base import LycorisBaseModule
from torch import Tensor, nn

from library.optim.naming import name_groups
from library.training.errors import UserError
from networks.blocks import BlockPlan, block_index
from networks.layers import TEXT_PREFIX, UNET_PREFIX, TextEncoders
from networks.modules import merge_into_layer, scale_by_alpha
from networks.weights import load_into, read_weights, write_weights

log = logging.getLogger(__name__)


class AdapterNetwork(nn.Module):
    """Adapters by part of the model; parameters are named as in files once it is applied.

    Args:
        adapters: those of the text encoders and the UNet, each with its `lora_name`.
        multiplier: strength, 1 in training.
        plan: ranks and learning-rate weights by block, where they differ.
    """

    def __init__(
        self,
        adapters: Sequence[LycorisBaseModule],
        multiplier: float = 1.0,
        plan: BlockPlan | None = None,
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.plan = plan
        self.text_encoder_loras = [a for a in adapters if a.lora_name.startswith(TEXT_PREFIX)]
        self.unet_loras = [a for a in adapters if a.lora_name.startswith(UNET_PREFIX)]
        self.set_loraplus_lr_ratio(None, None, None)

    @property
    def loras(self) -> list[LycorisBaseModule]:
        return self.text_encoder_loras + self.unet_loras

    def set_multiplier(self, multiplier: float) -> None:
        """The strength with which the network acts; 0 is the model without it."""
        self.multiplier = multiplier
        for lora in self.loras:
            lora.multiplier = multiplier

    # Applying

    def apply_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Let the model's layers call their adapters; adapters of a part left out are dropped."""
        if not apply_text_encoder:
            self.text_encoder_loras = []
        if not apply_unet:
            self.unet_loras = []
        for lora in self.loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)

    def restore(self) -> None:
        """Take the network off the model again."""
        for lora in self.loras:
            lora.restore()

    def is_mergeable(self) -> bool:
        return True

    def merge_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        weights_sd: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the network to the model's own weights, at its multiplier; don't apply it as well."""
        for lora in self.loras:
            merge_into_layer(lora)

    # Files

    def load_weights(self, file: str | Path) -> str:
        """Load a file into the network; says what was loaded. UserError if it doesn't fit."""
        return load_into(self.loras, read_weights(file), str(file))

    def scale_by_alpha(self) -> None:
        """Let the scales follow after `alpha` was set from outside."""
        for lora in self.loras:
            scale_by_alpha(lora)

    def save_weights(
        self, file: str | Path, dtype: torch.dtype | None, metadata: dict[str, str] | None
    ) -> None:
        """Write the network's file with stock's key names and hashes."""
        write_weights(self.state_dict(), Path(file), dtype, metadata or {})

    # Training

    def set_loraplus_lr_ratio(
        self, both: float | None, unet: float | None, text_encoder: float | None
    ) -> None:
        """LoRA+: how many times faster `lora_up` learns than `lora_down` (arXiv 2402.12354)."""
        self.loraplus_lr_ratio = both
        self.loraplus_unet_lr_ratio = unet
        self.loraplus_text_encoder_lr_ratio = text_encoder

    def prepare_optimizer_params(
        self,
        text_encoder_lr: float | None = None,
        unet_lr: float | None = None,
        default_lr: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups with `lr` and names (`named`), and a label for each.

        A part without a learning rate of its own takes `default_lr`. At learning rate 0 it gets no
        group and is not trained.
        """
        return self._groups(
            [(self.text_encoder_loras, "textencoder", text_encoder_lr)], unet_lr, default_lr
        )

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: float | Sequence[float] | None = None,
        unet_lr: float | None = None,
        default_lr: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The same with a learning rate for each text encoder; one alone holds for all."""
        parts: dict[str, list[LycorisBaseModule]] = {}
        for lora in self.text_encoder_loras:
            parts.setdefault(lora.lora_name.split("_")[1], []).append(lora)
        if isinstance(text_encoder_lr, int | float) or text_encoder_lr is None:
            rates: list[float | None] = [text_encoder_lr]
        else:
            rates = list(text_encoder_lr) or [None]
        if parts and len(rates) > len(parts):
            raise UserError(
                f"--text_encoder_lr has {len(rates)} values, but the network trains "
                f"{len(parts)} text encoder(s)."
            )
        rates += rates[-1:] * (len(parts) - len(rates))
        text_parts = [
            (loras, f"textencoder {part[2:]}".rstrip(), rate)
            for (part, loras), rate in zip(sorted(parts.items()), rates, strict=False)
        ]
        return self._groups(text_parts, unet_lr, default_lr)

    def _groups(
        self,
        text_parts: Sequence[tuple[list[LycorisBaseModule], str, float | None]],
        unet_lr: float | None,
        default_lr: float | None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        self.requires_grad_(True)
        groups: list[dict[str, Any]] = []
        labels: list[str] = []
        text_ratio = self.loraplus_text_encoder_lr_ratio or self.loraplus_lr_ratio
        unet_ratio = self.loraplus_unet_lr_ratio or self.loraplus_lr_ratio
        parts = [(*part, text_ratio) for part in text_parts]
        parts += [(*part, unet_ratio) for part in self._unet_parts(unet_lr, default_lr)]
        for loras, label, part_lr, ratio in parts:
            rate = default_lr if part_lr is None else part_lr
            for group, suffix in _split(loras, rate, ratio):
                groups.append(group)
                labels.append(label + suffix)
        return name_groups(self, groups), labels

    def _unet_parts(
        self, unet_lr: float | None, default_lr: float | None
    ) -> list[tuple[list[LycorisBaseModule], str, float | None]]:
        """The UNet as one part, or block by block where learning rates differ."""
        rate = default_lr if unet_lr is None else unet_lr
        if self.plan is None or self.plan.lr_weights is None or rate is None:
            return [(self.unet_loras, "unet", rate)]
        blocks: dict[int, list[LycorisBaseModule]] = {}
        for lora in self.unet_loras:
            blocks.setdefault(block_index(lora.lora_name, self.plan.sdxl), []).append(lora)
        return [
            (loras, f"unet_block{block}", rate * self.plan.lr_weights[block])
            for block, loras in blocks.items()
        ]

    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str | None = None
    ) -> tuple[int, float, float]:
        """`--scale_weight_norms`: how many were scaled down, mean norm, greatest norm."""
        training = self.training
        self.eval()  # rank_dropout would be measured too
        results = [lora.apply_max_norm(max_norm_value, device) for lora in self.loras]
        self.train(training)
        # Norms have no product of factors; LyCORIS answers None for them.
        norms = [float(norm) for _, norm in results if norm is not None]
        if not norms:
            return 0, 0.0, 0.0
        return sum(bool(scaled) for scaled, _ in results), sum(norms) / len(norms), max(norms)

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: adapters are recomputed with the layers that they belong to."""

    def prepare_grad_etc(self, *_: Any) -> None:
        """Stock's hook after `accelerate` took the network; groups have set what is trained."""

    def on_epoch_start(self, *_: Any) -> None:
        self.train()

    def on_step_start(self, *_: Any) -> None:
        """Stock's hook before a step; nothing to do."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def _split(
    loras: Sequence[LycorisBaseModule], rate: float | None, ratio: float | None
) -> list[tuple[dict[str, Any], str]]:
    """The parameters of `loras` as one group, or for LoRA+ as two; none at learning rate 0."""
    parameters = {False: [], True: []}  # type: dict[bool, list[nn.Parameter]]
    for lora in loras:
        for name, parameter in lora.named_parameters():
            parameters[bool(ratio) and "lora_up" in name].append(parameter)
    if not rate:
        for parameter in parameters[False] + parameters[True]:
            parameter.requires_grad_(False)
        return []
    slow = {"params": parameters[False], "lr": rate}
    fast = {"params": parameters[True], "lr": rate * (ratio or 1)}
    return [(group, suffix) for group, suffix in ((slow, ""), (fast, " plus")) if group["params"]]
