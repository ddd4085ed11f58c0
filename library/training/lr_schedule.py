"""The learning-rate schedules: stock's names and options, diffusers' and transformers' functions.

A schedule is stepped once per optimizer step, whatever the number of processes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.optim.registry import resolve
from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from library.training.options import Options

log = logging.getLogger(__name__)

# Which options each schedule reads, besides the learning rate.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "constant_with_warmup": ("lr_warmup_steps",),
    "linear": ("lr_warmup_steps",),
    "cosine": ("lr_warmup_steps",),
    "cosine_with_restarts": ("lr_warmup_steps", "lr_scheduler_num_cycles"),
    "polynomial": ("lr_warmup_steps", "lr_scheduler_power"),
    "piecewise_constant": (),
    "inverse_sqrt": ("lr_warmup_steps", "lr_scheduler_timescale"),
    "cosine_with_min_lr": (
        "lr_warmup_steps",
        "lr_scheduler_num_cycles",
        "lr_scheduler_min_lr_ratio",
    ),
    "warmup_stable_decay": (
        "lr_warmup_steps",
        "lr_decay_steps",
        "lr_scheduler_num_cycles",
        "lr_scheduler_min_lr_ratio",
    ),
    "adafactor": (),
}
# transformers has all of them but one; stock takes them from there too.
FUNCTIONS = {
    "constant": "transformers.optimization.get_constant_schedule",
    "constant_with_warmup": "transformers.optimization.get_constant_schedule_with_warmup",
    "linear": "transformers.optimization.get_linear_schedule_with_warmup",
    "cosine": "transformers.optimization.get_cosine_schedule_with_warmup",
    "cosine_with_restarts": (
        "transformers.optimization.get_cosine_with_hard_restarts_schedule_with_warmup"
    ),
    "polynomial": "transformers.optimization.get_polynomial_decay_schedule_with_warmup",
    "piecewise_constant": "diffusers.optimization.get_piecewise_constant_schedule",
    "inverse_sqrt": "transformers.optimization.get_inverse_sqrt_schedule",
    "cosine_with_min_lr": "transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup",
    "warmup_stable_decay": "transformers.optimization.get_wsd_schedule",
    "adafactor": "transformers.optimization.AdafactorSchedule",
}


def make_lr_scheduler(options: Options, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The schedule for `total_steps` optimizer steps.

    Schedule-free optimizers get one that leaves the learning rate alone. UserError where the
    options don't make a schedule (see `check_lr_scheduler`).
    """
    if is_schedule_free(options, optimizer):
        if options.lr_scheduler != "constant" or options.lr_scheduler_type:
            log.warning("a schedule-free optimizer has no use for a schedule: it is left out")
        return LambdaLR(optimizer, lambda step: 1.0)
    problems = check_lr_scheduler(options)
    if problems:
        raise UserError.listing(problems)
    arguments = scheduler_arguments(options)
    if options.lr_scheduler_type:
        _warn_about_idle_options(options, options.lr_scheduler_type)
        make = _custom_class(options.lr_scheduler_type)
        made: LRScheduler = make(optimizer, **arguments)
        return made
    name, _, initial_lr = options.lr_scheduler.partition(":")
    if optimizer.defaults.get("relative_step") and name != "adafactor":
        log.info("Adafactor chooses its own step size: its schedule only reports it, as in stock")
        if arguments:
            log.warning("--lr_scheduler_args has no effect on the schedule adafactor")
        name, arguments = "adafactor", {}
    _warn_about_idle_options(options, name)
    if name == "adafactor":
        arguments["initial_lr"] = float(initial_lr or options.learning_rate)
    arguments = _figures(name, options, total_steps) | arguments
    schedule: LRScheduler = _function(name)(optimizer, **arguments)
    return schedule


def get_scheduler_fix(args: Any, optimizer: Optimizer, num_processes: int) -> LRScheduler:
    """Stock's entry point, for a loop that steps the schedule once a step and process."""
    return make_lr_scheduler(args, optimizer, args.max_train_steps * num_processes)


def is_schedule_free(options: Options, optimizer: Optimizer) -> bool:
    """Whether the optimizer is of the schedule-free kind, which averages instead (by name)."""
    names = (options.optimizer_type or "", type(optimizer).__name__)
    return any(name.lower().endswith("schedulefree") for name in names)


def _figures(name: str, options: Options, total_steps: int) -> dict[str, Any]:
    """The arguments of the schedule's function that come from options of their own."""
    warmup = step_count(options.lr_warmup_steps, total_steps)
    decay = step_count(options.lr_decay_steps, total_steps)
    stable = total_steps - warmup - decay
    if name == "warmup_stable_decay" and stable < 0:
        raise UserError(
            f"--lr_warmup_steps ({warmup}) and --lr_decay_steps ({decay}) are more than the "
            f"run's {total_steps} steps"
        )
    with_warmup = {"num_warmup_steps": warmup}
    until_end = {"num_warmup_steps": warmup, "num_training_steps": total_steps}
    cycles = options.lr_scheduler_num_cycles
    min_ratio = options.lr_scheduler_min_lr_ratio
    figures: dict[str, dict[str, Any]] = {
        "constant_with_warmup": with_warmup,
        "linear": until_end,
        "cosine": until_end,
        "cosine_with_restarts": until_end | {"num_cycles": cycles},
        "polynomial": until_end | {"power": options.lr_scheduler_power},
        "inverse_sqrt": with_warmup | {"timescale": options.lr_scheduler_timescale},
        # Its function counts whole waves, the option falls from the top to the bottom.
        "cosine_with_min_lr": until_end | {"num_cycles": cycles / 2, "min_lr_rate": min_ratio},
        "warmup_stable_decay": with_warmup
        | {
            "num_stable_steps": stable,
            "num_decay_steps": decay,
            "num_cycles": cycles / 2,
            "min_lr_ratio": min_ratio or 0.0,
        },
    }
    return figures.get(name, {})


def step_count(value: float, total_steps: int) -> int:
    """`--lr_warmup_steps` and its like: below 1 a share of the run, else a number of steps."""
    return int(value * total_steps) if 0 < value < 1 else int(value)


def scheduler_arguments(options: Options) -> dict[str, Any]:
    """`--lr_scheduler_args` read as Python literals. UserError where one isn't `key=value`."""
    arguments = {}
    for text in options.lr_scheduler_args or []:
        key, equals, value = text.partition("=")
        try:
            arguments[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            hint = f'{key}="{value}" if it is text' if equals else "write key=value"
            raise UserError(f"--lr_scheduler_args: {text!r} cannot be read; {hint}") from None
    return arguments


def check_lr_scheduler(options: Options) -> list[str]:
    """What is wrong with the schedule's options: names, arguments, missing and clashing values."""
    try:
        arguments = scheduler_arguments(options)
        if options.lr_scheduler_type:
            return _check_custom(options, arguments)
        return _check_named(options, arguments)
    except UserError as error:
        return [str(error)]


def _check_custom(options: Options, arguments: dict[str, Any]) -> list[str]:
    what = f"--lr_scheduler_type {options.lr_scheduler_type}"
    takes = _custom_class(options.lr_scheduler_type)
    if takes is lr_scheduler.ReduceLROnPlateau:
        return [f"{what} waits for a metric at every step, which training doesn't have"]
    problems = _check_arguments(what, takes, arguments)
    if options.lr_warmup_steps:
        problems.append(f"{what} has no warm-up of its own: leave --lr_warmup_steps out")
    return problems


def _check_named(options: Options, arguments: dict[str, Any]) -> list[str]:
    name = _schedule_name(options.lr_scheduler)
    what = f"--lr_scheduler {options.lr_scheduler}"
    problems = _check_arguments(what, _function(name), arguments) if arguments else []
    if options.lr_warmup_steps and "lr_warmup_steps" not in SCHEDULES[name]:
        other = ", or take constant_with_warmup" if name == "constant" else ""
        problems.append(f"{what} has no warm-up: leave --lr_warmup_steps out{other}")
    if name == "adafactor" and not _is_adafactor(options.optimizer_type):
        problems.append(f"{what} is for --optimizer_type Adafactor only")
    if name == "piecewise_constant" and "step_rules" not in arguments:
        example = "step_rules='1:100,0.1:200,0.01'"
        problems.append(f'{what} needs --lr_scheduler_args "{example}" (factor:until which step)')
    if name == "cosine_with_min_lr":
        minimum = options.lr_scheduler_min_lr_ratio is not None
        if not minimum and not {"min_lr", "min_lr_rate"} & set(arguments):
            problems.append(f"{what} needs --lr_scheduler_min_lr_ratio")
    return problems


def _is_adafactor(optimizer_type: str) -> bool:
    """Whether it is transformers' Adafactor; a name that is none is complained of elsewhere."""
    try:
        return resolve(optimizer_type).adafactor
    except ValueError:
        return True


def _schedule_name(lr_scheduler: str) -> str:
    """The schedule's name, without adafactor's `:initial lr`. UserError where it's none."""
    name, colon, initial_lr = lr_scheduler.partition(":")
    if name not in SCHEDULES or (colon and name != "adafactor"):
        raise UserError(
            f"--lr_scheduler {lr_scheduler}: there is no such schedule."
            f"{did_you_mean(name, SCHEDULES)} There are {', '.join(SCHEDULES)}"
        )
    if colon:
        try:
            float(initial_lr)
        except ValueError:
            raise UserError(f"--lr_scheduler {lr_scheduler}: write adafactor:1e-4, say") from None
    return name


def _function(name: str) -> Callable[..., Any]:
    """Imported only when asked for: a check that finds nothing to ask stays fast."""
    module, _, function = FUNCTIONS[name].rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _custom_class(name: str) -> Callable[..., Any]:
    """A class of `torch.optim.lr_scheduler` by its name, any other by its import path."""
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        module: Any = lr_scheduler
    else:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise UserError(f"--lr_scheduler_type {name}: {error}") from error
    found: Any = getattr(module, class_name, None)
    if not inspect.isclass(found):
        schedules = [
            key
            for key, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, LRScheduler)
        ]
        raise UserError(
            f"--lr_scheduler_type {name}: {module.__name__} has no class {class_name}."
            f"{did_you_mean(class_name, schedules)}"
        )
    custom: Callable[..., Any] = found
    return custom


def _check_arguments(what: str, takes: Callable[..., Any], arguments: dict[str, Any]) -> list[str]:
    """Arguments that the schedule doesn't know, and those it cannot do without."""
    parameters = inspect.signature(takes).parameters
    known = [name for name in parameters if name not in ("self", "optimizer")]
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return []
    problems = []
    for name in arguments:
        if name not in known:
            hint = did_you_mean(name, known) or f" It has {', '.join(known)}"
            problems.append(f"{what} has no argument {name}.{hint}")
    if inspect.isclass(takes):
        missing = [
            name
            for name in known
            if parameters[name].default is inspect.Parameter.empty and name not in arguments
        ]
        if missing:
            problems.append(f"{what} needs {', '.join(missing)} in --lr_scheduler_args")
    return problems


def _warn_about_idle_options(options: Options, chosen: str) -> None:
    """Say which schedule options are set that the schedule doesn't read; a class reads none."""
    reads = SCHEDULES.get(chosen, ())
    defaults = Options()
    for name in sorted(set(chain.from_iterable(SCHEDULES.values())).difference(reads)):
        if getattr(options, name) != getattr(defaults, name):
            log.warning("--%s has no effect on the schedule %s", name, chosen)
