"""Models and adapters for tests: a tiny model, a network on it, and what it then puts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.training.models import DiffusionModel, load_model
from library.training.network import Adapter, adapter_state_dict, build_adapter
from library.training.options import Options


def options_for(folder: Path, **options: Any) -> Options:
    network_args = [f"{key}={value}" for key, value in options.pop("args", {}).items()]
    values = {
        "pretrained_model_name_or_path": str(folder),
        "network_module": "networks.lora",
        "network_dim": 4,
        "network_alpha": 2.0,
        "learning_rate": 1e-3,
        "network_args": network_args or None,
    }
    return Options.from_values(values | options)


def load(
    folder: Path, sdxl: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> DiffusionModel:
    return load_model(options_for(folder, **options), sdxl, dtype, "cpu")


def adapt(model: DiffusionModel, folder: Path, seed: int = 0, **options: Any) -> Adapter:
    """`build_adapter` with seeded initial weights; a new adapter changes nothing yet."""
    torch.manual_seed(seed)
    adapter = build_adapter(options_for(folder, **options), model)
    adapter.network.eval()
    return adapter


def stir(network: nn.Module, strength: float = 0.05, seed: int = 5) -> None:
    """Weights as if trained: every parameter moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter) * strength)


def output(model: DiffusionModel) -> Tensor:
    """What the UNet predicts for fixed latents, with the text encoders' embeddings of fixed ids."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(model.unet.dtype)
    ids = torch.randint(0, 400, (2, 77), generator=generator)
    outputs = [
        encoder(ids, output_hidden_states=True).hidden_states[-1] for encoder in model.text_encoders
    ]
    conditions: dict[str, Any] = {}
    if model.kind == "sdxl":
        pooled = model.text_encoders[1](ids).text_embeds
        times = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
        conditions = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
    context = torch.cat(outputs, dim=-1)
    prediction: Tensor = model.unet(latents, torch.tensor([10, 500]), context, **conditions).sample
    return prediction.float()


def trained(folder: Path, sdxl: bool = False, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """A file's tensors of an adapter with random weights, and what the model puts out with it."""
    model = load(folder, sdxl)
    plain = output(model)
    adapter = adapt(model, folder, **options)
    assert difference(output(model), plain) < 1e-5  # a new adapter changes nothing
    stir(adapter.network)
    with_adapter = output(model)
    assert difference(with_adapter, plain) > 0.02
    return adapter_state_dict(adapter, None), with_adapter


class OneBlock(nn.Module):
    """The layers of a UNet, once each: small enough to try every algorithm in every way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.attentions = Transformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=16,
            norm_num_groups=4,
            cross_attention_dim=16,
        )
        self.resnets = ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=16, groups=4)
        self.requires_grad_(False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attentions(x, context).sample
        return checkpoint(self.resnets, x, context[:, 0], use_reentrant=False)

    def output(self) -> Tensor:
        """For fixed input, with activations of the resnet recomputed in the backward pass."""
        generator = torch.Generator().manual_seed(1)
        dtype = self.resnets.norm1.weight.dtype
        x = torch.randn(2, 16, 6, 6, generator=generator)
        context = torch.randn(2, 5, 16, generator=generator)
        return self(x.to(dtype), context.to(dtype)).float()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())
