"""LoRA for a federated CLIP, as a wrapper around the host model (spec 4).

`LoRAConfig` needs nothing but this project; what needs PEFT and transformers is imported when it is
first asked for, and without them says what to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora.config import LoRAConfig

if TYPE_CHECKING:
    from lora.clip_wrapper import CLIPLoRAWrapper
    from lora.factory import LoRAConfigManager, LoRAModelManager, quick_clip_lora

__all__ = [
    "CLIPLoRAWrapper",
    "LoRAConfig",
    "LoRAConfigManager",
    "LoRAModelManager",
    "quick_clip_lora",
]

_HOMES = {
    "CLIPLoRAWrapper": "lora.clip_wrapper",
    "LoRAConfigManager": "lora.factory",
    "LoRAModelManager": "lora.factory",
    "quick_clip_lora": "lora.factory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
