"""Host models that `lora/` adds LoRA to; they know nothing of LoRA."""
