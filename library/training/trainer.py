"""A run from its options to its files, top to bottom."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from library.optim.registry import create_optimizer, import_path
from library.optim.telemetry import optimizer_summary
from library.training.accelerator import make_accelerator, shared_seed, weight_dtype
from library.training.checkpoints import Checkpoints
from library.training.config import CheckedRun, check
from library.training.errors import UserError
from library.training.interrupt import Interrupt
from library.training.log import setup_logging
from library.training.loop import Loop
from library.training.lr_schedule import make_lr_scheduler
from library.training.metadata import Kind
from library.training.models import DiffusionModel, load_model
from library.training.network import Adapter, adapter_state_dict, build_adapter
from library.training.noise import NoiseSchedule
from library.training.objective import Objective
from library.training.options import Options
from library.training.outcome import announce, leave_report
from library.training.plan import Plan, begin, plan_run
from library.training.processes import broadcast_parameters
from library.training.provenance import Provenance
from library.training.report import Report
from library.training.sampling import Sampler, read_prompts
from library.training.settle import settle
from library.training.snapshots import Snapshots
from library.training.state import Progress, load_state, saved_progress
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
        options = settle(Options.from_namespace(args))
        setup_logging(options)
        saved = saved_progress(Path(options.resume)) if options.resume else None
        options.seed = shared_seed(options, saved.seed if saved else None)
        run = check(options, sdxl=self.sdxl)
        options = run.options
        for note in run.notes:
            log.info("%s", note)
        if options.debug_dataset:
            for line in run.train_data.debug_lines(options):
                print(line)
            return True
        accelerator = make_accelerator(options)
        start, plan = plan_from(saved, run, accelerator.num_processes)
        set_seed((options.seed or 0) % 2**32)  # NumPy takes no larger one
        model = load_model(options, self.sdxl, weight_dtype(options), accelerator.device)
        prepare_data(run, model, accelerator)
        adapter = build_adapter(options, model)
        adapter.network.to(accelerator.device)
        loop = assemble(run, plan, start, model, adapter, accelerator)
        with Interrupt() as interrupt:
            finished = loop.run(interrupt)
            finish(loop)
        return finished


class SdxlNetworkTrainer(NetworkTrainer):
    """The trainer for SDXL models."""

    sdxl = True


def prepare_data(run: CheckedRun, model: DiffusionModel, accelerator: Accelerator) -> None:
    """Say what was found, and fill the latent cache where one is asked for."""
    for data in filter(None, (run.train_data, run.validation_data)):
        for line in data.describe():
            log.info("%s", line)
        with tqdm(desc="caching latents", unit="picture", delay=1, leave=False) as bar:

            def advance(done: int, total: int, bar: tqdm[Any] = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            data.cache_latents(
                model,
                run.options,
                progress=advance,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
            )
        accelerator.wait_for_everyone()
    if run.train_data.store is not None:
        model.vae.to("cpu")  # the sampler takes it back for as long as it draws


def plan_from(saved: Progress | None, run: CheckedRun, processes: int) -> tuple[Progress, Plan]:
    """Where the run begins, and how long it is; it is known then to `run.options` too.

    UserError if nothing is left to do, or if the state is that of another optimizer.
    """
    options = run.options
    optimizer = import_path(options.optimizer_type)
    if saved is not None and saved.optimizer != optimizer:
        raise UserError(
            f"--resume: the state holds that of the optimizer {saved.optimizer}, and "
            f"--optimizer_type {options.optimizer_type} is {optimizer}. Resume with the same "
            "one, or start from the adapter's file: --network_weights."
        )
    start = begin(options, saved, run.train_data.steps_per_epoch(processes), processes)
    start.optimizer = optimizer
    plan = plan_run(options, start)
    options.max_train_steps = plan.steps
    log.info("%s", describe(plan, run, processes))
    return start, plan


def assemble(
    run: CheckedRun,
    plan: Plan,
    start: Progress,
    model: DiffusionModel,
    adapter: Adapter,
    accelerator: Accelerator,
) -> Loop:
    """Put the parts of a run together, and bring them to where `--resume` left them."""
    options = run.options
    parameters = [p for group in adapter.groups for p in group["params"]]
    broadcast_parameters(parameters, accelerator)
    optimizer_path, arguments, optimizer = create_optimizer(
        options.optimizer_type, adapter.groups, options.learning_rate, run.optimizer_kwargs
    )
    optimizer_text = f"{optimizer_path}({arguments})" if arguments else optimizer_path
    log.info("optimizer: %s", optimizer_text)
    for line in optimizer_summary(optimizer):
        log.info("%s", line)
    loop = Loop(
        options=options,
        accelerator=accelerator,
        data=run.train_data,
        adapter=adapter,
        objective=Objective(
            options,
            accelerator,
            model,
            NoiseSchedule(model.scheduler_config, options.zero_terminal_snr),
            TextEncoding(model, options, adapter.trains_text_encoder),
        ),
        optimizer=accelerator.prepare(optimizer),
        lr_scheduler=make_lr_scheduler(options, optimizer, plan.steps),
        report=Report(options, plan.steps, plan.epochs, accelerator.is_main_process),
        validation=None
        if run.validation_data is None
        else Validation(options, accelerator, run.validation_data),
        plan=plan,
        progress=start,
        snapshots=_snapshots(options, plan, start) if accelerator.is_main_process else None,
    )
    if options.resume:
        loop.restore(load_state(Path(options.resume)))
        log.info("resumed %s: going on after step %d", options.resume, start.step)
    loop.checkpoints = _checkpoints(loop, run, model.kind, optimizer_text)
    loop.sampler = _sampler(loop, model)
    return loop


def describe(plan: Plan, run: CheckedRun, processes: int) -> str:
    """The run's length in a line."""
    batches = "/".join(str(each.spec.batch_size) for each in run.train_data.sets)
    return (
        f"{plan.steps} steps: {plan.epochs} epochs of {plan.steps_per_epoch} steps, batches of "
        f"{batches}, {run.options.gradient_accumulation_steps} accumulated, {processes} process(es)"
    )


def _checkpoints(loop: Loop, run: CheckedRun, kind: Kind, optimizer_text: str) -> Checkpoints:
    adapter = loop.adapter
    provenance = Provenance(
        options=loop.options,
        kind=kind,
        data=run.train_data,
        validation_data=run.validation_data,
        network_args=adapter.network_args,
        optimizer=optimizer_text,
        num_epochs=loop.plan.epochs,
        num_processes=loop.accelerator.num_processes,
    )
    return Checkpoints(
        options=loop.options,
        state_dict=lambda dtype: adapter_state_dict(adapter, dtype),
        metadata=provenance.metadata,
        save_state=loop.write_state,
        total_epochs=loop.plan.epochs,
        is_main=loop.accelerator.is_main_process,
    )


def _snapshots(options: Options, plan: Plan, start: Progress) -> Snapshots:
    """What the optimizer finds, beside the adapter; a resumed run goes on with the file."""
    path = Path(options.output_dir or ".") / f"{options.output_name or 'last'}-optimizer.jsonl"
    return Snapshots(path, plan.steps, resumed_at=start.step if options.resume else None)


def _sampler(loop: Loop, model: DiffusionModel) -> Sampler | None:
    options = loop.options
    if not options.sample_prompts:
        return None
    return Sampler(
        model,
        options,
        read_prompts(Path(options.sample_prompts)),
        options.output_dir or ".",
        options.output_name or "",
        start_step=loop.progress.step,
        tell=loop.report.pictures,
    )


def finish(loop: Loop) -> None:
    """Save the adapter and the report, and say where they are."""
    adapter_file = loop.save_final()
    loop.report.close()
    if loop.accelerator.is_main_process:
        announce(leave_report(loop, adapter_file))
    loop.accelerator.end_training()
