"""LoRA for a federated CLIP: which layers, and what the host has to do for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from library.optim.spelling import did_you_mean
from lora.base import LoRAError, LoRAWrapper
from lora.config import LoRAConfig, components_of
from models.clip import FederatedCLIPModel

logger = logging.getLogger(__name__)

VISION = "clip.vision_model."
PROJECTION = "clip.visual_projection"
HEAD = "classifier"
TEXT = ("clip.text_model.", "clip.text_projection.")  # never run for classification
LAYERS = ("q_proj", "k_proj", "v_proj", "fc1", "fc2")
EXCHANGE = ("get_parameters", "set_parameters")


class CLIPLoRAWrapper(LoRAWrapper):
    """A federated CLIP with LoRA, on PEFT; the host's code is not changed.

    The component `encoder` is, in every layer of the vision tower, q, k, v and both layers of the
    MLP, and the projection behind the tower. The text tower gets none: classification never runs
    it, so no gradient would come. On CLIP ViT-B/32 (151.3 M parameters) that makes 148,736 r
    parameters beside the head: 1.19, 2.38 and 4.76 M at r = 8, 16 and 32, or 0.79, 1.57 and 3.15 %.

    The component `classifier` is LoRA on the head. Without it the head, which is new for the task
    and would stay random, is trained whole: it travels and is saved too, beside LoRA's tensors.

    Args:
        federated_clip_model: the host; LoRA's layers go into it. A head that is frozen
            (`requires_grad_(False)`) stays so and does not travel: then LoRA alone does.
        lora_config: `LoRAConfig.for_clip_model()` by default. Its `target_modules` replace the
            choice above: whole names, or ends of names in the vision tower and behind it.
        target_components: some of `encoder`, `classifier`.

    Raises:
        ValueError: an unknown component, `target_modules` that the host does not have, or a host of
            another class.
        LoRAError: the host has LoRA layers already.
    """

    host: FederatedCLIPModel

    def __init__(
        self,
        federated_clip_model: FederatedCLIPModel,
        lora_config: LoRAConfig | None = None,
        target_components: Iterable[str] = ("encoder",),
    ) -> None:
        _check_host(federated_clip_model)
        super().__init__(federated_clip_model, lora_config or LoRAConfig.for_clip_model())
        self.target_components = components_of(target_components)
        self._find_targets()  # what the host does not have is refused now

    def apply_lora_to_federated_model(self) -> None:
        """Put LoRA's layers into the host.

        From then on the host hands out and takes (`get_parameters`, `set_parameters`) what the
        wrapper does: a program can go on with either.

        Raises:
            LoRAError: it has them already.
        """
        if not self.applied:
            _check_host(self.host)
        targets = self._find_targets()
        trains = any(tensor.requires_grad for tensor in self.host.classifier.parameters())
        self._add_layers(targets, [HEAD] if trains and HEAD not in targets else [], TEXT)
        for name in EXCHANGE:
            self.host.__dict__[name] = getattr(self, name)

    def merge_and_unload(self) -> FederatedCLIPModel:
        """See `LoRAWrapper.merge_and_unload`; the host hands out its own parameters again."""
        super().merge_and_unload()
        for name in EXCHANGE:
            del self.host.__dict__[name]
        return self.host

    def meaning(self) -> dict[str, Any]:
        """See `LoRAWrapper.meaning`: with the host's architecture."""
        normalizes = self.host.normalize_features
        return super().meaning() | self.host.architecture() | {"normalize_features": normalizes}

    def enable_gradient_checkpointing(self) -> None:
        """Keep no activations within the layers of the tower: less memory for a second forward."""
        self.host.clip.gradient_checkpointing_enable({"use_reentrant": False})

    def disable_gradient_checkpointing(self) -> None:
        """Undo `enable_gradient_checkpointing`."""
        self.host.clip.gradient_checkpointing_disable()

    def _find_targets(self) -> list[str]:
        """Whole names of the layers that get a LoRA."""
        present = [
            name
            for name, module in self.host.named_modules()
            if isinstance(module, nn.Linear) and not f"{name}.".startswith(TEXT)
        ]
        wanted = self.lora_config.target_modules
        if wanted is not None:
            return _matching(wanted, present)
        encoder = [
            name
            for name in present
            if name == PROJECTION or (name.startswith(VISION) and name.endswith(LAYERS))
        ]
        found = {"encoder": encoder, "classifier": [HEAD]}
        return [name for component in self.target_components for name in found[component]]


def _check_host(host: object) -> None:
    """
    Raises:
        ValueError: it is no FederatedCLIPModel; LoRAError: it has LoRA layers.
    """
    if isinstance(host, LoRAWrapper):
        raise LoRAError(
            "The host is itself a wrapper with LoRA: take the model in it (its `host`), which has "
            "to be merged first if LoRA was applied."
        )
    if not isinstance(host, FederatedCLIPModel):
        raise ValueError(f"LoRA here needs a FederatedCLIPModel; this is a {type(host).__name__}.")
    if EXCHANGE[0] in vars(host):
        raise LoRAError("The host has LoRA layers already: merge them, or take another host.")


def _matching(wanted: list[str], present: list[str]) -> list[str]:
    """Those of `present` that are named in `wanted`, whole or by their end."""
    fits = {one: [n for n in present if n == one or n.endswith(f".{one}")] for one in wanted}
    found = {name for names in fits.values() for name in names}
    missing = [one for one, names in fits.items() if not names]
    if not found:
        ends = sorted({name.rpartition(".")[2] for name in present})
        raise ValueError(
            f"target_modules={wanted!r}: the host has no such linear layer."
            f"{did_you_mean(wanted[0], ends)} "
            f"It has {', '.join(ends)}, or by whole name {present[0]} and others."
        )
    if missing:
        logger.warning("target_modules: the host has no linear layer %s.", ", ".join(missing))
    return [name for name in present if name in found]
