"""Runs inside a patched tree of sd-scripts: every network module it has, on models of full size.

The models are on the meta device, so that they need no memory; the networks are real, and take two
steps with random gradients. Prints, as JSON, what the plugin made of each.
"""

import importlib
import importlib.util
import json
import logging
import sys
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, "")
from library import train_util

# network module, model, network_args
CASES = [
    ("networks.lora", "sd", {}),
    ("networks.lora", "sd", {"conv_dim": "4"}),
    ("networks.lora", "sd", {"loraplus_lr_ratio": "16"}),
    ("networks.lora", "sdxl", {}),
    ("networks.lora_fa", "sd", {}),
    ("networks.dylora", "sd", {"unit": "4"}),
    ("networks.oft", "sdxl", {}),
    ("networks.loha", "sdxl", {}),
    ("networks.lokr", "sdxl", {}),
    ("networks.lora_sd3", "sd3", {}),
    ("networks.lora_flux", "flux", {}),
    ("networks.lora_flux", "flux", {"loraplus_lr_ratio": "16"}),
    ("networks.oft_flux", "flux", {}),
    ("networks.lora_lumina", "lumina", {}),
    ("networks.lora_anima", "anima", {}),
    ("networks.lora_hunyuan_image", "hunyuan", {}),
]
SD3_MEDIUM = {
    "patch_size": 2,
    "depth": 24,
    "num_patches": 36864,
    "pos_embed_max_size": 192,
    "adm_in_channels": 2048,
    "context_embedder_in_features": 4096,
    "context_embedder_out_features": 1536,
    "input_size": None,
    "model_type": "sd3m",
}
ANIMA = {
    "max_img_h": 512,
    "max_img_w": 512,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "num_blocks": 28,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "use_llm_adapter": True,
}


def clip(hidden: int, layers: int, heads: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return CLIPTextModel(config)


def make_model(kind: str) -> tuple[Any, Any]:
    """Text encoder (or encoders) and the model that draws, by the tree's own classes."""
    library = {
        "sd": "original_unet",
        "sdxl": "sdxl_original_unet",
        "sd3": "sd3_models",
        "flux": "flux_models",
        "lumina": "lumina_models",
        "anima": "anima_models",
        "hunyuan": "hunyuan_image_models",
    }
    models = importlib.import_module(f"library.{library[kind]}")
    make = {
        "sd": lambda: models.UNet2DConditionModel(64, 8, 768, False, False),
        "sdxl": lambda: models.SdxlUNet2DConditionModel(),
        "sd3": lambda: models.MMDiT(**SD3_MEDIUM),
        "flux": lambda: models.Flux(models.configs["dev"].params),
        "lumina": lambda: models.NextDiT_2B_GQA_patch2_Adaln_Refiner(),
        "anima": lambda: models.Anima(**ANIMA),
        "hunyuan": lambda: models.create_model("torch", False, None),
    }
    with torch.device("meta"):
        small, large = clip(768, 12, 12), clip(1280, 32, 20)
        model = make[kind]()
    return (
        small if kind == "sd" else [small, large] if kind in ("sdxl", "sd3") else [small]
    ), model


def arguments() -> SimpleNamespace:
    """What get_optimizer reads of a run's options."""
    return SimpleNamespace(
        optimizer_type="HinaAdamW",
        optimizer_args=["wd_transition_steps=2"],
        learning_rate=1e-3,
        unet_lr=1e-4,
        text_encoder_lr=5e-5,
    )


def groups_of(network: Any, args: SimpleNamespace) -> Any:
    """As the tree's train_network.py asks for them."""
    rates = (args.text_encoder_lr, args.unet_lr, args.learning_rate)
    if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        found = network.prepare_optimizer_params_with_multiple_te_lrs([rates[0]] * 3, *rates[1:])
    else:
        found = network.prepare_optimizer_params(*rates)
    return found[0] if isinstance(found, tuple) else found


def run(module: str, kind: str, keywords: dict[str, str]) -> dict[str, Any]:
    text_encoder, model = make_model(kind)
    maker = importlib.import_module(module)
    size = 64 if "oft" in module else 4  # OFT's is the number of blocks: more are smaller
    network = maker.create_network(1.0, size, 1e-3, None, text_encoder, model, **keywords)
    network.apply_to(text_encoder, model, True, True)
    if any(param.is_meta for param in network.parameters()):  # DyLoRA's go where the model is
        network.to_empty(device="cpu")
    for param in network.parameters():
        torch.nn.init.normal_(param, std=0.02)
    args = arguments()
    groups = train_util.hina_plugin.name_groups(args, network, groups_of(network, args))
    rates = [group["lr"] for group in groups]
    name, _, optimizer = train_util.get_optimizer(args, groups)
    torch.manual_seed(0)
    for _ in range(3):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        optimizer.step()
    return {
        "optimizer": name,
        "rates": rates,
        "kept": [group["lr"] for group in optimizer.param_groups],
        "names": [list(group["param_names"]) for group in optimizer.param_groups],
        "expected": {n: p.requires_grad for n, p in network.named_parameters()},
        "info": optimizer.get_optimization_info(),
        "report": train_util.hina_plugin.optimizer_report(optimizer),
    }


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    told = {}
    for module, kind, keywords in CASES:
        words = " ".join(f"{key}={value}" for key, value in keywords.items())
        if importlib.util.find_spec(module) is not None:
            told[f"{module} {kind} {words}".strip()] = run(module, kind, keywords)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
