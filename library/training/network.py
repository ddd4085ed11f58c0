"""The adapter of a run: made, loaded, applied to the model, and its parameter groups named."""

from __future__ import annotations

import importlib
import inspect
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.optim.naming import name_groups
from library.training.errors import UserError
from library.training.models import DiffusionModel
from library.training.network_check import OUR_NAME, check_network, split_arguments
from library.training.options import Options
from networks.layers import TEXT_PREFIX, UNET_PREFIX, with_stock_paths
from networks.network import AdapterNetwork
from networks.weights import saved_tensors

__all__ = ["Adapter", "adapter_state_dict", "build_adapter", "check_network"]

log = logging.getLogger(__name__)

# Labels of groups in which text encoders may take part.
UNCLEAR = BOTH, UNKNOWN = ("unet and text_encoder", "adapter")


@dataclass
class Adapter:
    """A network that is applied to a model.

    Attributes:
        network: parameters are named as in files.
        groups: for the optimizer, with `params`, `lr` and `named`, a name for each parameter.
        group_labels: for logs, one a group: `unet`, `text_encoder`, `text_encoder 1`,
            `unet_block4`; with ` plus` the faster half of LoRA+.
        module_name: `--network_module`.
        network_args: `--network_args` as they were typed.
        trains_text_encoder: whether a group may hold parameters of a text encoder.
    """

    network: nn.Module
    groups: list[dict[str, Any]]
    group_labels: list[str]
    module_name: str
    network_args: dict[str, str]
    trains_text_encoder: bool
    parts: tuple[Any, nn.Module]  # text encoder(s) and UNet, as network modules expect them

    def begin_epoch(self) -> None:
        """Tell the network that an epoch begins, as stock does."""
        self._call("on_epoch_start")

    def begin_step(self) -> None:
        """Tell the network that a micro-batch begins, as stock does."""
        self._call("on_step_start")

    def _call(self, hook: str) -> None:
        method = getattr(self.network, hook, None)
        if method is not None:
            method(*self.parts)

    def training_state(self) -> dict[str, Tensor]:
        """All that the network's output depends on, exactly; files round and fold some of it."""
        tensors = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Bring the network to `state`; UserError if it was saved from another network."""
        here = self.training_state()
        unlike = {n for n, t in here.items() if n not in state or state[n].shape != t.shape}
        unlike |= state.keys() - here.keys()
        if unlike:
            raise UserError(
                f"--resume: the state holds another network: {len(unlike)} tensors differ (first: "
                f"{min(unlike)}). Resume with the --network_… options it was saved with."
            )
        for name, tensor in here.items():
            tensor.copy_(state[name])
        if isinstance(self.network, AdapterNetwork):
            self.network.scale_by_alpha()


def build_adapter(options: Options, model: DiffusionModel) -> Adapter:
    """Make the adapter that the options ask for and apply it; the base model is frozen.

    The adapter's parameters are float32, with `--full_fp16` and `--full_bf16` as these say.
    UserError if weights or arguments don't fit the model.
    """
    name = options.network_module or ""
    module = importlib.import_module(OUR_NAME.get(name, name))
    for part in (model.unet, model.vae, *model.text_encoders):
        part.requires_grad_(False)
    _merge_base_weights(options, model, module)
    arguments, _ = split_arguments(options.network_args)
    network = _create(options, model, module, arguments)
    if hasattr(network, "prepare_network"):
        network.prepare_network(options)
    parts = (_text_encoder(model), model.unet)
    network.apply_to(
        *parts,
        not options.network_train_unet_only,
        not options.network_train_text_encoder_only,
    )
    made_from_file = options.dim_from_weights and isinstance(network, AdapterNetwork)
    if options.network_weights and not made_from_file:
        log.info("%s", network.load_weights(options.network_weights))
    if options.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
        raise UserError(f"--scale_weight_norms: {name} cannot do it; leave it out.")
    _set_precision(options, network)
    if hasattr(network, "prepare_grad_etc"):
        network.prepare_grad_etc(*parts)
    groups, labels = _groups(options, network)
    adapter = Adapter(
        network=network,
        groups=groups,
        group_labels=labels,
        module_name=name,
        network_args=arguments,
        trains_text_encoder=not options.network_train_unet_only
        and any(label.startswith("text_encoder") or label in UNCLEAR for label in labels),
        parts=parts,
    )
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(adapter, model)
    return adapter


def adapter_state_dict(adapter: Adapter, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of the adapter's file under stock's keys, in `dtype` (None: as trained).

    A network of another project is asked to save itself: what it writes may not be what it trains.
    """
    network: Any = adapter.network
    if isinstance(network, AdapterNetwork) or not hasattr(network, "save_weights"):
        return saved_tensors(network.state_dict(), dtype)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "network.safetensors")
        network.save_weights(file, dtype, {})
        return load_file(file)


def enable_gradient_checkpointing(adapter: Adapter, model: DiffusionModel) -> None:
    """Recompute activations in the backward pass, in each part that gradients flow through."""
    model.unet.enable_gradient_checkpointing()
    if adapter.trains_text_encoder:
        for text_encoder in model.text_encoders:
            text_encoder.gradient_checkpointing_enable()
            text_encoder.train()  # transformers checkpoints only then
    network: Any = adapter.network
    if hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()


def _text_encoder(model: DiffusionModel) -> nn.Module | list[nn.Module]:
    """As network modules expect it: one or, for SDXL, a list; with stock's paths."""
    encoders = [with_stock_paths(encoder) for encoder in model.text_encoders]
    return encoders[0] if len(encoders) == 1 else encoders


def _create(options: Options, model: DiffusionModel, module: Any, arguments: dict[str, str]) -> Any:
    # Third-party modules read `dropout` among the arguments, stock's `neuron_dropout`.
    keywords: dict[str, Any] = {"dropout": options.network_dropout, **arguments}
    parts = (model.vae, _text_encoder(model), model.unet)
    if options.dim_from_weights:
        network, _ = module.create_network_from_weights(
            1.0, options.network_weights, *parts, **keywords
        )
        return network
    return module.create_network(
        1.0,
        options.network_dim,
        options.network_alpha,
        *parts,
        neuron_dropout=options.network_dropout,
        **keywords,
    )


def _merge_base_weights(options: Options, model: DiffusionModel, module: Any) -> None:
    """`--base_weights`: adapters that become part of the base model, in the order given."""
    files = options.base_weights or []
    strengths = [*(options.base_weights_multiplier or []), *[1.0] * len(files)]
    for file, strength in zip(files, strengths, strict=False):
        network, weights = module.create_network_from_weights(
            strength, file, model.vae, _text_encoder(model), model.unet, for_inference=True
        )
        weight = next(model.unet.parameters())
        network.merge_to(_text_encoder(model), model.unet, weights, weight.dtype, weight.device)
        log.info("merged %s into the base model at strength %g", file, strength)


def _set_precision(options: Options, network: nn.Module) -> None:
    dtype = torch.float32
    if options.full_fp16 or options.full_bf16:
        dtype = torch.float16 if options.full_fp16 else torch.bfloat16
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def _groups(options: Options, network: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The network's parameter groups with names, and their labels; for every network module."""
    rates: Any = options.text_encoder_lr
    if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        prepare = network.prepare_optimizer_params_with_multiple_te_lrs
    else:
        prepare = network.prepare_optimizer_params
        if isinstance(rates, list):
            if len(set(rates)) > 1:
                raise UserError(
                    f"--text_encoder_lr {rates}: {options.network_module} takes one learning rate "
                    "for all text encoders."
                )
            rates = rates[0] if rates else None
    values = [rates, options.unet_lr, options.learning_rate]
    # The oldest modules have no default learning rate.
    result = prepare(*values[: len(inspect.signature(prepare).parameters)])
    groups, labels = result if isinstance(result, tuple) else (result, None)
    named = name_groups(network, groups)
    if not any(group["params"] for group in named):
        raise UserError(
            "nothing is trained: every learning rate (--learning_rate, --unet_lr, "
            "--text_encoder_lr, block weights) is 0."
        )
    if labels is None:
        labels = [_part(group["named"]) for group in named]
    return named, [label.replace("textencoder", "text_encoder") for label in labels]


def _part(names: list[str]) -> str:
    """The label of a group whose network gave none: the part that its names are of."""
    parts = {UNET_PREFIX: "unet", TEXT_PREFIX: "text_encoder"}
    found = [parts[p] for p in parts if any(name.startswith(p) for name in names)]
    return found[0] if len(found) == 1 else BOTH if found else UNKNOWN
