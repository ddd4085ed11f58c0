"""Parameter groups as stock's LoRA makes them: views of dictionaries, LoRA+, descriptions."""

import torch
from torch import nn


class LoRAModule(nn.Module):
    def __init__(self, name: str, inputs: int = 24, outputs: int = 16, rank: int = 4) -> None:
        super().__init__()
        self.lora_name = name
        self.lora_down = nn.Linear(inputs, rank, bias=False)
        self.lora_up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_up(self.lora_down(x))


class LoRANetwork(nn.Module):
    def __init__(self, loraplus_lr_ratio: float | None) -> None:
        super().__init__()
        self.ratio = loraplus_lr_ratio
        names = [f"lora_{part}_{k}_to_q" for part in ("unet_blocks", "te_layers") for k in range(3)]
        self.loras = [LoRAModule(name) for name in names]
        for lora in self.loras:
            self.add_module(lora.lora_name, lora)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(lora(x) for lora in self.loras)

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr):
        groups, descriptions = [], []
        for part, lr in (("te", text_encoder_lr), ("unet", unet_lr)):
            kinds = {"": {}, " plus": {}}
            for lora in self.loras:
                for name, param in lora.named_parameters():
                    fast = self.ratio is not None and "lora_up" in name
                    if lora.lora_name.startswith(f"lora_{part}"):
                        kinds[" plus" if fast else ""][f"{lora.lora_name}.{name}"] = param
            for kind, params in kinds.items():
                if params:
                    own = lr or default_lr
                    rate = own * self.ratio if kind else own
                    groups.append({"params": params.values(), "lr": rate})
                    descriptions.append(part + kind)
        return groups, descriptions


def create_network(**arguments) -> LoRANetwork:
    ratio = arguments.get("loraplus_lr_ratio")
    return LoRANetwork(None if ratio is None else float(ratio))
