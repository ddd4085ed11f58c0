"""LoRA by PEFT in any host model, in place, and the parameters that then travel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from models.parameters import as_arrays, load_arrays, refuse_nonfinite
from utils.packages import missing_package

try:
    import peft
except ModuleNotFoundError as error:
    raise missing_package(error) from error

ADAPTER = "default"  # PEFT's name for the only adapter
PREFIX = "base_model.model."  # PEFT's, before a name of the host
WHOLE = f".modules_to_save.{ADAPTER}"  # PEFT's copy of a module that is trained whole
ORIGINAL = ".original_module."


class LoRAError(RuntimeError):
    """A call that does not fit what was done to the wrapper before; says which call is missing."""


class LoRAWrapper(nn.Module):
    """A host model with LoRA layers, which answers to all that the host does.

    What it has not itself (`train_step`, `evaluate`, `image_size`, …) is the host's.

    Args:
        host: changed in place.
        lora_config: its `target_modules` are the subclass's to read.
    """

    host: nn.Module

    def __init__(self, host: nn.Module, lora_config: LoRAConfig) -> None:
        super().__init__()
        self.host = host
        self.lora_config = lora_config
        self.targets: list[str] = []
        self._peft: list[Any] = []  # in a list, so that its tensors are not counted twice
        self._merged = False
        self._was_trainable: set[str] = set()
        self._while_enabled: set[str] | None = None  # what trained before LoRA was disabled

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "host":  # not there yet: the error is this one
                raise
            return getattr(self.host, name)

    # The host's own calls (`train_step`, `evaluate`) change modes: there is only the host's.
    @property
    def training(self) -> bool:
        """As of any module."""
        host = self.__dict__.get("_modules", {}).get("host")
        return True if host is None else host.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "host" in self.__dict__.get("_modules", {}):
            self.host.training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's."""
        return self.host(*args, **kwargs)

    @property
    def applied(self) -> bool:
        """Whether the host has LoRA layers now."""
        return bool(self._peft)

    def peft_model(self) -> Any:
        """PEFT's own view of the host.

        Raises:
            LoRAError: no LoRA layers yet, or no more.
        """
        if self._merged:
            raise LoRAError(
                "LoRA was merged into the host already; wrap the host anew for another."
            )
        if not self._peft:
            raise LoRAError(
                "LoRA is not applied yet: call apply_lora_to_federated_model() before this."
            )
        return self._peft[0]

    @property
    def made_with(self) -> LoRAConfig:
        """The configuration as it was when LoRA was applied; of a later change to `lora_config`
        only `save_only_trainable` acts.

        Raises:
            LoRAError: no LoRA layers yet, or no more.
        """
        self.peft_model()
        return self._made_with

    def _add_layers(
        self, targets: Sequence[str], whole: Sequence[str], unused: Sequence[str]
    ) -> None:
        """Put LoRA on the linear layers `targets`, and train the modules `whole` beside.

        A's first values come from the configuration's seed, whatever was drawn before. Parameters
        whose names begin with one of `unused` stay frozen.

        Raises:
            LoRAError: that was done already.
            ValueError: the configuration has become impossible.
        """
        if self._merged or self._peft:
            raise LoRAError(
                "LoRA was applied to this host already; to do so again, merge it and wrap it anew."
            )
        config, host = replace(self.lora_config), self.host
        training = host.training
        self._was_trainable = self._trainable()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            made = peft.get_peft_model(
                host,
                peft.LoraConfig(
                    r=config.r,
                    lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # any number does
                    lora_dropout=config.lora_dropout,
                    target_modules=list(targets),
                    modules_to_save=list(whole) or None,
                    bias=config.bias,  # type: ignore[arg-type]  # checked above
                    base_model_name_or_path=host.__dict__.get("name_or_path") or None,
                ),
                ADAPTER,
            )
        self.targets, self._peft, self._made_with = list(targets), [made], config
        for name, tensor in host.named_parameters():
            original = ORIGINAL in name or name.startswith(tuple(unused))
            if original or (config.freeze_a and _half_of(name) == "lora_A"):
                tensor.requires_grad_(False)
        self._trained = self._trainable()
        host.train(training)  # PEFT's new layers come in training mode

    def _trainable(self) -> set[str]:
        return {name for name, tensor in self.host.named_parameters() if tensor.requires_grad}

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """All that is not the untouched host's, by the names PEFT's files have: LoRA's halves,
        frozen or not, and what is trained whole."""
        self.peft_model()
        return {
            _peft_name(name): tensor
            for name, tensor in self.host.named_parameters()
            if name in self._trained or _half_of(name)
        }

    def _travelling(self) -> dict[str, nn.Parameter]:
        self.peft_model()
        everything = not self.lora_config.save_only_trainable
        return {
            _peft_name(name): tensor
            for name, tensor in self.host.named_parameters()
            if everything or name in self._trained
        }

    def get_parameters(self) -> list[np.ndarray]:
        """What travels: what is trained, or all with `save_only_trainable=False`."""
        return as_arrays(self._travelling())

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        """Take what another's `get_parameters` returned.

        Raises:
            ValueError: it does not fit or is not finite; names the tensor, changes nothing.
        """
        load_arrays(self._travelling(), parameters)

    def adapter_state(self) -> dict[str, np.ndarray]:
        """What `get_parameters` returns, by name: PEFT's, without the adapter's own name."""
        return dict(zip(self._travelling(), self.get_parameters(), strict=True))

    def fingerprint(self) -> str:
        """SHA-256 over names and values of all that does not travel, and over `meaning`.

        Two machines whose adapters would not mean the same have different ones: other base weights,
        another architecture or `lora_alpha`, or other frozen halves.
        """
        travelling = {id(tensor) for tensor in self._travelling().values()}
        kept = {
            name: tensor
            for name, tensor in [*self.host.named_parameters(), *self.host.named_buffers()]
            if id(tensor) not in travelling
        }
        return _digest(kept, json.dumps(self.meaning(), sort_keys=True))

    def meaning(self) -> dict[str, Any]:
        """What no tensor tells, but changes what an adapter does."""
        return {"scale": self.made_with.lora_alpha / self.made_with.r}

    def base_digest(self, prefix: str) -> str:
        """SHA-256 over the weights that the host had before LoRA below `prefix`, by their names
        then: the same whatever layers have a LoRA. Trained biases are left out."""
        trained = {id(tensor) for tensor in self.adapter_tensors().values()}
        weights = {
            name.replace(".base_layer", ""): tensor
            for name, tensor in self.host.named_parameters()
            if name.startswith(prefix) and id(tensor) not in trained
        }
        return _digest(weights)

    def count_parameters(self) -> tuple[int, int]:
        """How many are trained, and how many the host has without LoRA."""
        self.peft_model()
        sizes = {name: tensor.numel() for name, tensor in self.host.named_parameters()}
        trained = sum(size for name, size in sizes.items() if name in self._trained)
        own = sum(size for name, size in sizes.items() if not (_half_of(name) or WHOLE in name))
        return trained, own

    def enable_lora_layers(self) -> None:
        """Undo `disable_lora_layers`; what trained before it does again, and nothing else."""
        made = self.peft_model()
        trains = self._trainable() if self._while_enabled is None else self._while_enabled
        self._while_enabled = None
        made.base_model.enable_adapter_layers()  # unfreezes what was frozen, too
        for name, tensor in self.host.named_parameters():
            tensor.requires_grad_(name in trains)

    def disable_lora_layers(self) -> None:
        """Answer as the host did before LoRA, its untrained head included, until enabled again.

        Raises:
            ValueError: `bias` is not `none`: the host's own biases were trained.
        """
        made = self.peft_model()
        if self.made_with.bias != "none":
            raise ValueError(
                f"bias='{self.made_with.bias}' trains the host's own biases, whose first values "
                "are gone: LoRA can be disabled only with bias='none'."
            )
        if self._while_enabled is None:
            self._while_enabled = self._trainable()
        made.base_model.disable_adapter_layers()

    def merge_and_unload(self) -> nn.Module:
        """The host with plain layers again, B A added to their weights.

        It goes on where the wrapper ends: the wrapper is used up, and what was trainable before
        LoRA is again.

        Raises:
            LoRAError: no LoRA layers yet, or no more.
            ValueError: a tensor holds NaN or infinity; nothing has been merged then.
        """
        made = self.peft_model()
        refuse_nonfinite(self.adapter_tensors())
        self.enable_lora_layers()
        training = self.host.training
        made.merge_and_unload()
        for name, tensor in self.host.named_parameters():
            tensor.requires_grad_(name in self._was_trainable)
        self.host.train(training)
        self._peft, self._merged = [], True
        return self.host


def _digest(tensors: Mapping[str, Tensor], beginning: str = "") -> str:
    digest = hashlib.sha256(beginning.encode())
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _half_of(name: str) -> str | None:
    return next((half for half in ("lora_A", "lora_B") if f".{half}." in name), None)


def _peft_name(name: str) -> str:
    """A parameter's name in PEFT's files."""
    return PREFIX + name.replace(WHOLE, "").replace(f".{ADAPTER}", "")
