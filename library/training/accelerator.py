"""Where and in which precision a run computes."""

from __future__ import annotations

import logging
import os
import random
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import Tensor

from library.training.errors import UserError
from library.training.options import Options

log = logging.getLogger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(options: Options) -> Accelerator:
    """Accelerate's view of this process. UserError if it should be one of several and is alone."""
    _join_processes(options)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and PartialState().num_processes == 1:
        raise UserError(
            f"{started} processes were started, and each would train alone: without a GPU "
            "accelerate joins them only if it is told to use processors. Start them with "
            f"accelerate launch --num_processes {started} --cpu, or set ACCELERATE_USE_CPU=True."
        )
    accelerator = Accelerator(
        # Accumulation is the loop's: it knows how many batches the last step of an epoch has.
        gradient_accumulation_steps=1,
        mixed_precision=options.mixed_precision,
    )
    if options.full_fp16 and accelerator.scaler is not None:
        take_float16_gradients(accelerator.scaler)
    return accelerator


def take_float16_gradients(scaler: torch.amp.GradScaler) -> None:
    """Let a gradient scaler unscale float16 gradients: with `--full_fp16` there are no others.

    PyTorch refuses them (seen in 2.13) because the unscaled ones may underflow; stock takes them.
    """
    unscale = scaler._unscale_grads_

    def unscale_any(
        optimizer: torch.optim.Optimizer, inverse_scale: Tensor, found_inf: Tensor, _: bool
    ) -> dict[torch.device, Tensor]:
        return unscale(optimizer, inverse_scale, found_inf, True)

    scaler._unscale_grads_ = unscale_any  # type: ignore[assignment]


def shared_seed(options: Options, saved: int | None = None) -> int:
    """The run's seed, the same in every process: `--seed`, that of a state, or one by chance."""
    if options.seed is not None:
        return options.seed
    drawn = [random.getrandbits(31) if saved is None else saved]
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
