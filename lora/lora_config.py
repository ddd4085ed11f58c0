"""`lora.config` under the name that its first documentation used."""

from lora.config import LoRAConfig

__all__ = ["LoRAConfig"]
