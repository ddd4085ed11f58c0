"""A run from its options to its files, top to bottom."""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from library.optim.registry import create_optimizer
from library.optim.telemetry import optimizer_summary
from library.training.accelerator import make_accelerator, weight_dtype
from library.training.checkpoints import Checkpoints
from library.training.config import CheckedRun, check
from library.training.interrupt import Interrupt
from library.training.log import setup_logging
from library.training.loop import Loop
from library.training.lr_schedule import make_lr_scheduler
from library.training.models import DiffusionModel, load_model
from library.training.network import Adapter, adapter_state_dict, build_adapter
from library.training.noise import NoiseSchedule
from library.training.objective import Objective
from library.training.options import Options
from library.training.outcome import announce, write_report
from library.training.processes import broadcast_parameters
from library.training.report import Report
from library.training.sampling import Sampler, read_prompts
from library.training.state import load_state, save_state
from library.training.text import TextEncoding
from library.training.validation import Validation

log = logging.getLogger(__name__)


class NetworkTrainer:
    """Trains one adapter; `train` is the whole of it. The name and the call are stock's."""

    sdxl = False

    def train(self, args: Options | argparse.Namespace) -> bool:
        """Train as `args` say. False if Ctrl-C ended the run early (everything was saved).

        Raises UserError for what the user can mend, most of it before the model is loaded.
        """
        options = args if isinstance(args, Options) else Options.from_namespace(args)
        setup_logging(options)
        if options.seed is None:
            options.seed = random.getrandbits(31)
            log.info("no --seed given: this run uses %d", options.seed)
        run = check(options, sdxl=self.sdxl)
        for note in run.notes:
            log.info("%s", note)
        accelerator = make_accelerator(options)
        set_seed(options.seed)
        model = load_model(options, self.sdxl, weight_dtype(options), accelerator.device)
        prepare_data(run, model, accelerator)
        adapter = build_adapter(options, model)
        loop = assemble(run, model, adapter, accelerator)
        with Interrupt() as interrupt:
            loop.run(interrupt)
        finish(loop, model)
        return not interrupt.requested


def prepare_data(run: CheckedRun, model: DiffusionModel, accelerator: Accelerator) -> None:
    """Say what was found, and fill the latent cache where one is asked for."""
    for data in filter(None, (run.train_data, run.validation_data)):
        for line in data.describe():
            log.info("%s", line)
        if run.options.cache_latents or run.options.cache_latents_to_disk:
            data.cache_latents(
                model, run.options, accelerator.process_index, accelerator.num_processes
            )
            accelerator.wait_for_everyone()


def assemble(
    run: CheckedRun, model: DiffusionModel, adapter: Adapter, accelerator: Accelerator
) -> Loop:
    """Put the parts of a run together, and bring them to where `--resume` left them."""
    options = run.options
    parameters = [p for group in adapter.groups for p in group["params"]]
    broadcast_parameters(parameters, accelerator)
    name, arguments, optimizer = create_optimizer(
        run.optimizer_spec, adapter.groups, options.learning_rate, run.optimizer_kwargs
    )
    log.info("optimizer: %s(%s)", name, arguments)
    for line in optimizer_summary(optimizer):
        log.info("%s", line)
    steps_per_epoch = math.ceil(
        run.train_data.steps_per_epoch(accelerator.num_processes)
        / options.gradient_accumulation_steps
    )
    if options.max_train_epochs:
        options.max_train_steps = options.max_train_epochs * steps_per_epoch
    total_epochs = math.ceil(options.max_train_steps / steps_per_epoch)
    scheduler = make_lr_scheduler(options, optimizer, options.max_train_steps)
    report = Report(options, options.max_train_steps, total_epochs, accelerator.is_main_process)
    loop = Loop(
        options=options,
        accelerator=accelerator,
        data=run.train_data,
        adapter=adapter,
        objective=Objective(
            options,
            accelerator,
            model,
            NoiseSchedule.from_config(model.scheduler_config, options),
            TextEncoding(model, options),
        ),
        optimizer=accelerator.prepare(optimizer),
        lr_scheduler=scheduler,
        report=report,
        sampler=None,
        validation=_validation(run, accelerator),
        total_steps=options.max_train_steps,
        total_epochs=total_epochs,
    )
    loop.progress.seed = options.seed or 0
    loop.checkpoints = _checkpoints(loop, run, f"{name}({arguments})" if arguments else name)
    if options.resume:
        loop.restore(load_state(Path(options.resume)))
        log.info("resumed %s: going on after step %d", options.resume, loop.progress.step)
    loop.sampler = _sampler(model, loop)
    return loop
