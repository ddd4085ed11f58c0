"""Where and in which precision a run computes."""

from __future__ import annotations

import logging
import os
import random
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from library.training.options import Options

log = logging.getLogger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(options: Options) -> Accelerator:
    """Accelerate's view of this process."""
    handlers = []
    if options.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=options.ddp_timeout)))
    return Accelerator(
        # Accumulation is the loop's: it knows how many batches the last step of an epoch has.
        gradient_accumulation_steps=1,
        mixed_precision=options.mixed_precision,
        kwargs_handlers=handlers or None,
    )


def shared_seed(options: Options) -> int:
    """The run's seed: `--seed`, or one drawn by chance, the same in every process."""
    if options.seed is not None:
        return options.seed
    drawn = [random.getrandbits(31)]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState()  # joins the processes, so that they can agree
        broadcast_object_list(drawn)
    log.info("no --seed given: this run uses %d", drawn[0])
    return drawn[0]


def weight_dtype(options: Options) -> torch.dtype:
    """The dtype of the frozen base model, and with `--full_fp16` or `--full_bf16` of all."""
    return WEIGHT_DTYPES[options.mixed_precision]
