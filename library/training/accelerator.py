"""Where and in which precision a run computes."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from library.training.errors import UserError
from library.training.options import Options

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(options: Options) -> Accelerator:
    """Accelerate's view of this process."""
    handlers = []
    if options.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=options.ddp_timeout)))
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError(
            "--mixed_precision fp16 needs a GPU, and PyTorch finds none here. "
            "Use --mixed_precision bf16, or no."
        )
    return Accelerator(
        # Accumulation is the loop's: it knows how many batches the last step of an epoch has.
        gradient_accumulation_steps=1,
        mixed_precision=options.mixed_precision,
        kwargs_handlers=handlers or None,
    )


def weight_dtype(options: Options) -> torch.dtype:
    """The dtype of the frozen base model, and with `--full_fp16` or `--full_bf16` of all."""
    return WEIGHT_DTYPES[options.mixed_precision]
