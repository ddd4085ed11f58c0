"""Write a diffusers model as one file in the layout of the original Stable Diffusion repositories.

The names are those of CompVis' latent-diffusion (UNet, VAE), of CLIP as transformers names it
(SD 1.x, SDXL's first text encoder) and of OpenCLIP (SD 2.x, SDXL's second).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _rename(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def unet_name(name: str, layers: int, attending: set[str]) -> str:
    """`layers` is layers_per_block, `attending` the numbers of the up blocks with attention."""
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name)
    if match:
        side, block, part, layer, rest = match.groups()
        if side == "down":
            place = f"input_blocks.{1 + int(block) * (layers + 1) + int(layer)}"
        else:
            place = f"output_blocks.{int(block) * (layers + 1) + int(layer)}"
        return f"{place}.0.{_rename(rest, RESNET)}" if part == "resnets" else f"{place}.1.{rest}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv\.(.*)", name)
    if match:
        side, block, rest = match.groups()
        if side == "down":
            return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{rest}"
        index = 2 if block in attending else 1
        return f"output_blocks.{int(block) * (layers + 1) + layers}.{index}.conv.{rest}"
    match = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    if match:
        part, index_text, rest = match.groups()
        if part == "attentions":
            return f"middle_block.1.{rest}"
        return f"middle_block.{2 * int(index_text)}.{_rename(rest, RESNET)}"
    return _rename(name, UNET_ENDS)


def vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    match = re.match(r"encoder\.down_blocks\.(\d)\.(.*)", name)
    if match:
        rest = match[2].replace("resnets.", "block.").replace("downsamplers.0", "downsample")
        return f"encoder.down.{match[1]}.{rest}"
    match = re.match(r"decoder\.up_blocks\.(\d)\.(.*)", name)
    if match:
        rest = match[2].replace("resnets.", "block.").replace("upsamplers.0", "upsample")
        return f"decoder.up.{levels - 1 - int(match[1])}.{rest}"
    match = re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    if match:
        side, part, index, rest = match.groups()
        if part == "attentions":
            return f"{side}.mid.attn_1.{_rename(rest, VAE_ATTENTION)}"
        return f"{side}.mid.block_{int(index) + 1}.{rest}"
    return name


def vae_tensors(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in state.items():
        new = vae_name(name, levels)
        is_projection = ".attn_1." in new and new.endswith(".weight") and tensor.ndim == 2
        tensors[new] = tensor[:, :, None, None] if is_projection else tensor
    return tensors


def open_clip_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' text model as OpenCLIP names it: q, k and v stacked, the projection turned."""
    names = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    tensors = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix("text_model.")
        match = re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if name == "text_projection.weight":
            tensors["text_projection"] = tensor.T.contiguous()
        elif not match:
            tensors[names[name]] = tensor
        elif match[2] in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        elif match[2] == "self_attn.q_proj":
            qkv = [state[full_name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensors[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = torch.cat(qkv)
        else:
            part = {
                "self_attn.out_proj": "attn.out_proj",
                "layer_norm1": "ln_1",
                "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
            }[match[2]]
            tensors[f"transformer.resblocks.{match[1]}.{part}.{match[3]}"] = tensor
    return tensors


def original_tensors(
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline,
) -> dict[str, Tensor]:
    """All of a pipeline's weights under the original names."""
    unet, vae, encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    layers = unet.config.layers_per_block
    state = unet.state_dict()
    attending = {name.split(".")[1] for name in state if re.match(r"up_blocks\.\d\.att", name)}
    tensors = {
        f"model.diffusion_model.{unet_name(name, layers, attending)}": tensor
        for name, tensor in state.items()
    }
    levels = len(vae.config.block_out_channels)
    for name, tensor in vae_tensors(vae.state_dict(), levels).items():
        tensors[f"first_stage_model.{name}"] = tensor
    first = {
        "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in encoder.state_dict().items()
    }
    if hasattr(pipeline, "text_encoder_2"):
        second = open_clip_tensors(pipeline.text_encoder_2.state_dict())
        tensors |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in first.items()}
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
    elif unet.config.use_linear_projection:
        tensors |= {
            f"cond_stage_model.model.{k}": v
            for k, v in open_clip_tensors(encoder.state_dict()).items()
        }
    else:
        tensors |= {f"cond_stage_model.transformer.{k}": v for k, v in first.items()}
    return tensors


def save_original(pipeline: StableDiffusionPipeline, path: Path) -> Path:
    """Save `pipeline` as one .safetensors file (or .ckpt, after the suffix)."""
    tensors = {name: tensor.contiguous() for name, tensor in original_tensors(pipeline).items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    return path
