"""Where and in which precision a run computes."""

from __future__ import annotations

import logging
import os
import random
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from library.training.options import Options

log = logging.getLogger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(options: Options) -> Accelerator:
    """Accelerate's view of this process."""
    _join_processes(options)
    return Accelerator(
        # Accumulation is the loop's: it knows how many batches the last step of an epoch has.
        gradient_accumulation_steps=1,
        mixed_precision=options.mixed_precision,
    )


def shared_seed(options: Options) -> int:
    """The run's seed: `--seed`, or one drawn by chance, the same in every process."""
    if options.seed is not None:
        return options.seed
    drawn = [random.getrandbits(31)]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _join_processes(options)  # so that they can agree
        broadcast_object_list(drawn)
    log.info("no --seed given: this run uses %d", drawn[0])
    return drawn[0]


def _join_processes(options: Options) -> None:
    """Start the process group of a run on several processes; a second call changes nothing.

    Not left to the Accelerator, which would leave out a timeout that is NCCL's default, also where
    another backend with another default is at work.
    """
    timeout = {"timeout": timedelta(minutes=options.ddp_timeout)} if options.ddp_timeout else {}
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **timeout)


def weight_dtype(options: Options) -> torch.dtype:
    """The dtype of the frozen base model, and with `--full_fp16` or `--full_bf16` of all."""
    return WEIGHT_DTYPES[options.mixed_precision]
