"""From the command line and `--config_file` to Options, and from Options to a run that can start.

`parse` is quick: a misspelt option is answered before torch is imported. `check` finds every other
mistake it can without loading a model, and raises all of them as one UserError.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.training.config_file import read_config_file, write_config_file
from library.training.errors import UserError
from library.training.option_checks import option_problems
from library.training.option_notes import option_notes
from library.training.options import OPTIONS, Options, setup_parser
from library.training.paths import clean_path
from library.training.run_checks import check_optimizer, open_data, run_problems, without_repeats
from library.training.settle import settle

if TYPE_CHECKING:
    from library.training.data import TrainingData


@dataclass
class CheckedRun:
    """A run that can start: its settled options, and what checking them had to build anyway."""

    options: Options
    train_data: TrainingData
    validation_data: TrainingData | None
    notes: list[str]  # remarks for the log
    optimizer_kwargs: dict[str, Any]


def parse(
    argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> Options:
    """The options of a command line (sys.argv's without `argv`) and of its `--config_file`.

    With `--output_config`, writes that file and exits. A `parser` of your own may have further
    arguments; they become attributes. UserError lists what cannot be understood.
    """
    parser = parser or setup_parser()
    typed = _typed(parser, argv)
    name = clean_path(str(typed["config_file"])) if "config_file" in typed else None
    if name is not None and typed.get("output_config"):
        print(f"wrote {write_config_file(name, typed)}")
        raise SystemExit(0)
    # Arguments of a trainer built on this one, with their own defaults.
    more = {a.dest: a.default for a in parser._actions if a.dest not in {*OPTIONS, "help"}}
    values, notes = read_config_file(name, more) if name is not None else ({}, [])
    options = Options.from_values({**values, **typed}, notes)
    unset = {key: default for key, default in more.items() if key not in options.given}
    return settle(options.changed(unset))


def _typed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Only what stands on the command line, without defaults."""
    unset = object()
    namespace = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    parsed = vars(parser.parse_args(argv, namespace))
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in parsed.items()
        if value is not unset
    }


def check(options: Options | argparse.Namespace, sdxl: bool = False) -> CheckedRun:
    """Check everything about a run that can be checked without loading its model.

    `options.seed` must be set: the data depends on it. Returns the settled options with the data
    and the optimizer's arguments that checking resolved. UserError lists every problem found, in
    the options, files, pictures and packages.
    """
    options = settle(Options.from_namespace(options))
    problems = option_problems(options, sdxl)
    problems += without_repeats(run_problems(options, sdxl), problems)
    optimizer_kwargs = check_optimizer(options, problems)
    data = open_data(options, problems)
    if problems or data is None:
        raise UserError.listing(dict.fromkeys(problems))
    train_data, validation_data = data
    return CheckedRun(
        options=options,
        train_data=train_data,
        validation_data=validation_data,
        notes=[*options.notes, *option_notes(options, sdxl)],
        optimizer_kwargs=optimizer_kwargs,
    )
