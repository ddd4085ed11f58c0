"""The model of a run, the same for server and clients."""

from __future__ import annotations

from library.training.errors import UserError
from lora.clip_wrapper import CLIPLoRAWrapper
from utils.model_factory import create_model

from .settings import Settings


def lora_model(settings: Settings) -> CLIPLoRAWrapper:
    """The model of a run, LoRA applied.

    Raises:
        UserError: the configuration describes a model without LoRA.
    """
    model = create_model(settings.model)
    if not isinstance(model, CLIPLoRAWrapper):
        raise UserError(
            "A federated run trains LoRA: model.type has to be 'clip_lora', and lora.enabled true."
        )
    return model
