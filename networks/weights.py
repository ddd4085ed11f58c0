"""Adapter files: reading, fitting into a network, making a network out of one, writing."""

from __future__ import annotations

import logging
import math
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lycoris.modules import get_module
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.training.errors import UserError
from networks.layers import from_original_layout, named_layers
from networks.modules import Full, GLoRA, LoKr, LoRA, finish, scale_by_alpha

log = logging.getLogger(__name__)

# What reading a damaged file or one of another kind raises.
_DAMAGE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError)


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter file, on the CPU; UserError if it is missing or damaged."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"adapter file {path}: there is no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise UserError(f"adapter file {path}: cannot be read: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise UserError(f"adapter file {path}: cannot be read: it holds more than named tensors.")
    return loaded


def by_layer(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer, under the layer's name in diffusers' layout.

    `{"lora_unet_mid_block_attentions_0_proj_in": {"lora_down.weight": …, "alpha": …}, …}`
    """
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in weights.items():
        name, _, rest = key.partition(".")
        layers[from_original_layout(name)][rest] = tensor
    return dict(layers)


def adapters_from_weights(
    weights: Mapping[str, Tensor],
    text_encoders: Sequence[nn.Module],
    unet: nn.Module | None,
    source: str,
    multiplier: float = 1.0,
    dropout: float = 0.0,
    **dropouts: float,
) -> list[LycorisBaseModule]:
    """An adapter with its weights for each layer of the file, whatever the algorithm of each.

    Args:
        source: the file's name, for messages.
        dropouts: `rank_dropout` and `module_dropout`.
    """
    layers = {name: layer for name, _, layer in named_layers(text_encoders, unet)}
    adapters = []
    left_out = []
    for name, tensors in by_layer(weights).items():
        if name in layers:
            made = _adapter(name, layers[name], tensors, source, multiplier, dropout, dropouts)
            adapters.append(made)
        else:
            left_out.append(name)
    _tell(source, len(adapters), left_out)
    return adapters


def load_into(
    adapters: Sequence[LycorisBaseModule], weights: Mapping[str, Tensor], source: str
) -> str:
    """Load a file's weights into adapters that are there; says what was loaded.

    The file's alpha comes with its weights: the network starts as what the file draws.
    """
    layers = by_layer(weights)
    named = {adapter.lora_name: adapter for adapter in adapters}
    _tell(source, len(named.keys() & layers.keys()), [name for name in layers if name not in named])
    for name in named.keys() & layers.keys():
        _load(named[name], layers[name], source)
    fresh = len(named.keys() - layers.keys())
    return f"{len(named) - fresh} layers loaded from {source}" + (f", {fresh} new" if fresh else "")


def write_weights(
    weights: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None, metadata: dict[str, str]
) -> None:
    """Write an adapter file, by its ending safetensors (with stock's hashes) or a pickle."""
    from library.training.metadata import file_hashes

    tensors = saved_tensors(weights, dtype)
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata | file_hashes(tensors, metadata))
    else:
        torch.save(tensors, file)


def saved_tensors(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors as a file holds them: on the CPU, in `dtype`.

    `alpha` keeps its precision: LoKr's may be its rank of 100000, which float16 does not reach.
    """
    return {
        key: value.detach()
        .to("cpu", None if key.endswith((".alpha", ".on_input")) else dtype)
        .contiguous()
        for key, value in weights.items()
    }


def _tell(source: str, found: int, left_out: Sequence[str]) -> None:
    if not found:
        example = f" Its first layer is {left_out[0]}." if left_out else " It is empty."
        raise UserError(
            f"{source} fits no layer that is trained here: it is for another kind of model or "
            f"network.{example}"
        )
    if left_out:
        log.warning(
            "%s: %d of %d layers are not trained here and left out (first: %s)",
            source,
            len(left_out),
            found + len(left_out),
            left_out[0],
        )


def _adapter(
    name: str,
    layer: nn.Module,
    tensors: dict[str, Tensor],
    source: str,
    multiplier: float,
    dropout: float,
    dropouts: Mapping[str, float],
) -> LycorisBaseModule:
    kind = get_module({f"{name}.{key}": tensor for key, tensor in tensors.items()}, name)[0]
    if kind not in _CONSTRUCTION:
        raise UserError(f"{source}: {name} holds {', '.join(tensors)}, which nothing here reads.")
    adapter_class, keys = _CONSTRUCTION[kind]
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    adapter = adapter_class(name, layer, multiplier, **keys(tensors, alpha), **dropouts)
    finish(adapter, dropout)  # before loading: its parameters become float32
    if isinstance(adapter, LokrModule):
        _shape_like(adapter, tensors, source)
    _load(adapter, tensors, source)
    return adapter


def _low_rank(factor: str, dim: int, tucker: str) -> Any:
    """Reads constructor keys where `tensors[factor].shape[dim]` is the rank."""

    def keys(tensors: Mapping[str, Tensor], alpha: float | None) -> dict[str, Any]:
        scale = tensors.get("dora_scale")
        return {
            "lora_dim": tensors[factor].shape[dim],
            "alpha": alpha,
            "use_tucker": tucker in tensors,
            "weight_decompose": scale is not None,
            # DoRA's scale has one entry an output, or one an input.
            "wd_on_out": scale is None or scale.shape[1] == 1,
        }

    return keys


def _orthogonal(tensors: Mapping[str, Tensor], alpha: float | None) -> dict[str, Any]:
    return {
        "lora_dim": tensors["oft_blocks"].shape[-1],
        "constraint": alpha or 0,
        "rescaled": "rescale" in tensors,
    }


def _kronecker(tensors: Mapping[str, Tensor], alpha: float | None) -> dict[str, Any]:
    scale = tensors.get("dora_scale")
    return {
        "full_matrix": True,
        "weight_decompose": scale is not None,
        "wd_on_out": scale is None or scale.shape[1] == 1,
    }


_CONSTRUCTION: dict[type, tuple[type[LycorisBaseModule], Any]] = {
    LoConModule: (LoRA, _low_rank("lora_down.weight", 0, "lora_mid.weight")),
    LohaModule: (LohaModule, _low_rank("hada_w1_b", 0, "hada_t1")),
    LokrModule: (LoKr, _kronecker),
    GLoRAModule: (GLoRA, _low_rank("a2.weight", 0, "bm.weight")),
    DiagOFTModule: (DiagOFTModule, _orthogonal),
    ButterflyOFTModule: (ButterflyOFTModule, _orthogonal),
    IA3Module: (IA3Module, lambda tensors, _: {"train_on_input": bool(tensors["on_input"])}),
    NormModule: (NormModule, lambda *_: {}),
    FullModule: (Full, lambda *_: {}),
}


def _shape_like(adapter: LokrModule, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give a LoKr adapter the factors that the file has; UserError if they don't make its layer.

    How a weight was divided cannot be told from the factors' shapes alone, so they are taken as
    they are instead of being made by the rule that the file's trainer used.
    """
    factors = {key: value for key, value in tensors.items() if key.startswith("lokr_")}
    wanted = tuple(adapter.shape)
    if not factors.keys() & {"lokr_w2", "lokr_t2"}:
        wanted = (wanted[0], math.prod(wanted[1:]))  # w2_b holds inputs and kernel in one
    found = _kronecker_shape(factors)
    if found != wanted:
        raise UserError(
            f"{source}: {adapter.lora_name} is for weights of {found}, those of this model are "
            f"{wanted}. The file is for another kind of model."
        )
    del adapter.lokr_w1, adapter.lokr_w2
    for key, value in factors.items():
        setattr(adapter, key, nn.Parameter(torch.empty_like(value, dtype=torch.float32)))
    adapter.use_w1, adapter.use_w2 = "lokr_w1" in factors, "lokr_w2" in factors
    adapter.tucker = "lokr_t2" in factors
    adapter.full_matrix = adapter.use_w1 and adapter.use_w2
    inner = factors.get("lokr_w2_b", factors.get("lokr_w1_b"))
    adapter.lora_dim = 1 if inner is None else inner.shape[0]
    adapter.alpha.fill_(adapter.lora_dim)


def _kronecker_shape(factors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of w1 ⊗ w2, each whole or a product: (outputs, inputs, *kernel)."""
    if "lokr_w1" in factors:
        rows, columns = factors["lokr_w1"].shape
    else:
        rows, columns = factors["lokr_w1_a"].shape[0], factors["lokr_w1_b"].shape[1]
    if "lokr_w2" in factors:
        out, inner, *kernel = factors["lokr_w2"].shape
    else:
        tucker = factors.get("lokr_t2")
        out = factors["lokr_w2_a"].shape[0 if tucker is None else 1]
        inner = factors["lokr_w2_b"].shape[1]
        kernel = [] if tucker is None else list(tucker.shape[2:])
    return rows * out, columns * inner, *kernel


def _load(adapter: LycorisBaseModule, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load one layer's tensors; UserError that says which shape is not right."""
    expected = adapter.state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        if key in ("alpha", "on_input"):
            continue
        here = tuple(expected[key].shape) if key in expected else None
        there = tuple(tensors[key].shape) if key in tensors else None
        if here != there:
            raise UserError(
                f"{source}: {adapter.lora_name}.{key} is {there or 'missing'} in the file and "
                f"{here or 'not there'} in the network. Set --network_module, --network_dim and "
                "--network_args as the file was trained, or use --dim_from_weights."
            )
    adapter.load_state_dict(dict(tensors), strict=False)
    if "alpha" not in tensors and hasattr(adapter, "alpha") and hasattr(adapter, "lora_dim"):
        adapter.alpha.fill_(adapter.lora_dim)  # files from before alpha
    scale_by_alpha(adapter)
