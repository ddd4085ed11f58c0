"""Mistakes that only show with the files and packages a run will use.

What a part of the trainer needs, that part checks; here they are asked one after the other, each
imported only now. Every function returns or adds lines for the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.training.errors import UserError
from library.training.options import Options

if TYPE_CHECKING:
    from library.training.data import TrainingData


def run_problems(options: Options, sdxl: bool) -> Iterator[str]:
    """What stands in the way of the run: its model, adapter, schedule, prompts, logs and state."""
    from library.training.files import recover_folder
    from library.training.lr_schedule import check_lr_scheduler
    from library.training.model_files import check_model_path
    from library.training.network_check import check_network
    from library.training.state import check_state
    from library.training.trackers import check_logging

    yield from check_model_path(options, sdxl)
    yield from check_network(options)
    yield from check_lr_scheduler(options)
    yield from _prompts(options)
    yield from check_logging(options)
    if options.resume:
        recover_folder(Path(options.resume))
        yield from check_state(Path(options.resume))
    yield from _gpu(options)


def _prompts(options: Options) -> list[str]:
    from library.training.prompts import read_prompts

    if not options.sample_prompts:
        return []
    try:
        read_prompts(options.sample_prompts)
    except UserError as error:
        return error.problems
    return []


def _gpu(options: Options) -> Iterator[str]:
    import torch

    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        yield (
            "--mixed_precision fp16 needs a GPU, and PyTorch finds none here. "
            "Use --mixed_precision bf16, or no."
        )


def check_optimizer(options: Options, problems: list[str]) -> dict[str, Any]:
    """The optimizer's arguments; what is wrong with it or them is added to `problems`."""
    from library.optim import registry

    spec, cls = None, None
    arguments: dict[str, Any] = {}
    try:
        spec = registry.resolve(options.optimizer_type)
        cls = spec.load()
    except ValueError as error:
        problems.append(f"--optimizer_type {options.optimizer_type}: {error}")
    try:
        arguments = registry.parse_optimizer_args(options.optimizer_args)
        if spec is not None and cls is not None:
            registry.check_arguments(cls, arguments, spec.fixed)
    except ValueError as error:
        problems.append(f"--optimizer_args: {error}")
    return arguments


def open_data(
    options: Options, problems: list[str]
) -> tuple[TrainingData, TrainingData | None] | None:
    """(training, validation) data, or None with the reasons added to `problems`."""
    from library.training.data import TrainingData

    try:
        training, validation = TrainingData.open(options)
    except UserError as error:
        problems.extend(without_repeats(error.problems, problems))
        return None
    problems.extend(_cached_captions(options, training))
    return training, validation


def _cached_captions(options: Options, data: TrainingData) -> Iterator[str]:
    """Cached captions that would be another each time; they may be so by the dataset config."""
    if not options.cache_text_encoder_outputs:
        return
    varied = (
        "shuffle_caption",
        "enable_wildcard",
        "caption_dropout_rate",
        "caption_dropout_every_n_epochs",
        "caption_tag_dropout_rate",
        "token_warmup_step",
    )
    for subset in (subset for each in data.sets for subset in each.spec.subsets):
        found = [name for name in varied if getattr(subset, name)]
        if found:
            yield (
                f"{subset.source}: --cache_text_encoder_outputs excludes {', '.join(found)}, "
                "which make a caption another one each time."
            )


def without_repeats(lines: Iterable[str], problems: list[str]) -> list[str]:
    """`lines` but for those about an option whose value `problems` already complain of."""
    named = {problem.split(maxsplit=1)[0].rstrip(":,") for problem in problems}
    return [
        line
        for line in lines
        if not line.startswith("--") or line.split(maxsplit=1)[0].rstrip(":,") not in named
    ]
