"""Networks from arguments: an adapter for every layer that is selected.

The two functions are stock's, each with the name of the network module before its arguments; the
network modules are these two with their names filled in.
"""

from __future__ import annotations

import logging
from typing import Any

from lycoris.logging import logger as lycoris_log
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.norms import NormModule
from lycoris.wrapper import network_module_dict
from torch import Tensor, nn

from library.training.errors import UserError
from networks.arguments import NetworkArguments, read_arguments
from networks.blocks import LR_WEIGHTS, BlockPlan, block_index, lr_weights_plan, plan_blocks
from networks.keys import CONSTRUCTOR_NAMES, LORA_PLUS, layer_keys
from networks.layers import UNET_PREFIX, TextEncoders, as_list, is_sdxl, selected_layers
from networks.modules import OUR_CLASSES, finish
from networks.network import AdapterNetwork
from networks.presets import Selection, preset_selection, stock_selection
from networks.weights import adapters_from_weights, read_weights

log = logging.getLogger(__name__)

# What LyCORIS has to say goes where everything else is logged, instead of to stdout in colours.
lycoris_log.handlers.clear()
lycoris_log.propagate = True

MODULE_CLASSES: dict[str, type[LycorisBaseModule]] = network_module_dict | OUR_CLASSES


def create_network(
    module: str,
    /,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> AdapterNetwork:
    """A new network; apply it with `apply_to`.

    Needs no weights of the model (they may be on the meta device), except for DoRA and `algo=full`.

    Args:
        module: whose network it is, such as `networks.lora`.
        multiplier: strength, 1 in training.
        network_dim: rank, 4 if None.
        network_alpha: scale times rank, 1 if None; 0 means the rank, that is scale 1.
        text_encoder: one, or a list (SDXL).
        neuron_dropout: as `dropout` among `kwargs`.
        kwargs: `--network_args`; an unknown or useless one is a UserError.
    """
    arguments = read_arguments(module, network_dim, network_alpha, neuron_dropout, kwargs)
    if module == "networks.kohya":
        selection = preset_selection(arguments.get("preset") or "full", arguments.algorithm)
    else:
        by_block = "conv_block_dims" in arguments.options
        selection = stock_selection(arguments.conv_dim is not None or by_block)
    plan = plan_blocks(
        arguments.options,
        is_sdxl(unet),
        arguments.dim,
        arguments.alpha,
        arguments.conv_dim,
        arguments.conv_alpha,
    )
    adapters = [
        _adapter(name, layer, config, arguments, selection, plan, multiplier)
        for name, layer, config in selected_layers(selection, as_list(text_encoder), unet)
    ]
    made = [adapter for adapter in adapters if adapter is not None]
    if not made:
        raise UserError(
            "the network has no layer to train: no part of the model is what the preset, the ranks "
            "and the block-wise keys in --network_args ask for."
        )
    return _network(made, multiplier, plan, arguments)


def create_network_from_weights(
    module: str,
    /,
    multiplier: float,
    file: str | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """The network that a file (or its tensors) holds, with its weights, and the tensors.

    Algorithms, layers, ranks and alphas are the file's; among `kwargs` the dropouts and the
    learning-rate keys act. Nothing is applied yet.
    """
    arguments = read_arguments(module, None, None, None, kwargs)
    acting = {"dropout", "rank_dropout", "module_dropout", *LORA_PLUS, *LR_WEIGHTS}
    ignored = sorted(arguments.options.keys() - acting)
    if ignored:
        log.warning("--network_args %s: the file decides", ", ".join(ignored))
    weights = read_weights(file or "") if weights_sd is None else weights_sd
    adapters = adapters_from_weights(
        weights,
        as_list(text_encoder),
        unet,
        file or "the weights",
        multiplier,
        arguments.dropout,
        rank_dropout=arguments.get("rank_dropout"),
        module_dropout=arguments.get("module_dropout"),
    )
    plan = lr_weights_plan(arguments.options, is_sdxl(unet))
    return _network(adapters, multiplier, plan, arguments), weights


def _network(
    adapters: list[LycorisBaseModule],
    multiplier: float,
    plan: BlockPlan | None,
    arguments: NetworkArguments,
) -> AdapterNetwork:
    network = AdapterNetwork(adapters, multiplier, plan)
    network.set_loraplus_lr_ratio(
        arguments.get("loraplus_lr_ratio"),
        arguments.get("loraplus_unet_lr_ratio"),
        arguments.get("loraplus_text_encoder_lr_ratio"),
    )
    log.info(
        "network: %d UNet and %d text encoder modules",
        len(network.unet_loras),
        len(network.text_encoder_loras),
    )
    return network


def _adapter(
    name: str,
    layer: nn.Module,
    config: dict[str, Any],
    arguments: NetworkArguments,
    selection: Selection,
    plan: BlockPlan | None,
    multiplier: float,
) -> LycorisBaseModule | None:
    """The adapter of one layer, or None if the layer is of no kind that gets one."""
    if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        if not arguments.get("train_norm"):
            return None
        norm = NormModule(name, layer, multiplier, module_dropout=arguments.get("module_dropout"))
        return finish(norm)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    size = _rank_and_alpha(name, layer, arguments, selection, plan)
    dim = config.pop("dim", None) or size[0]
    if dim is None:
        return None
    alpha = config.pop("alpha", None) or size[1]
    algorithm = config.pop("algo", arguments.algorithm)
    settings = {**arguments.options, "dropout": arguments.dropout, **config}
    constructor_keys = {
        CONSTRUCTOR_NAMES.get(key, key): settings.get(key, argument.off)
        for key, argument in layer_keys(algorithm).items()
        if key not in ("dropout", "bypass_mode")  # `finish` sees to these
    }
    adapter_class = MODULE_CLASSES[algorithm]
    adapter = adapter_class(name, layer, multiplier, dim, alpha, **constructor_keys)
    return finish(adapter, settings["dropout"])


def _rank_and_alpha(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    arguments: NetworkArguments,
    selection: Selection,
    plan: BlockPlan | None,
) -> tuple[int | None, float]:
    """Rank and alpha of a layer that says nothing of its own; no rank for one that is left out."""
    small = isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)
    if plan is None or not name.startswith(UNET_PREFIX):
        if small:
            return arguments.dim, arguments.alpha
        return arguments.conv_dim if selection.convolutions else None, arguments.conv_alpha
    dims, alphas = (plan.dims, plan.alphas) if small else (plan.conv_dims, plan.conv_alphas)
    if dims is None or alphas is None:
        return None, 0.0
    block = block_index(name, plan.sdxl)
    return dims[block] or None, alphas[block]
