"""The command line: an argparse parser made from the options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from library.optim.spelling import did_you_mean
from library.training.errors import UserError
from library.training.options.fields import Option
from library.training.options.table import OPTIONS
from library.training.refusals import REFUSED


class OptionParser(argparse.ArgumentParser):
    """A parser that answers mistakes with one line (UserError) instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument ").rstrip(".") + ".")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; unknown options are answered with the nearest ones."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError.listing(unknown_words(unknown))
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        option = OPTIONS.get(action.dest)
        problem = option.choice_problem(value) if option else None
        if problem:
            raise UserError(f"{problem}.")
        super()._check_value(action, value)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of `train_network.py`: stock's options and a few more."""
    parser = OptionParser(
        usage="%(prog)s [--config_file FILE.toml] [options]",
        description="Train an adapter (LoRA, LoKr, LoHa, …) for a Stable Diffusion model.",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in OPTIONS.values():
        if option.topic not in groups:
            groups[option.topic] = parser.add_argument_group(option.topic)
        groups[option.topic].add_argument(option.flag, **_arguments(option))
    return parser


def _arguments(option: Option) -> dict[str, Any]:
    """The keywords of `add_argument` for `option`."""
    text = option.help.replace("%", "%%")
    if option.name in REFUSED:
        text += " [not supported here]"
    if option.kind is bool:
        return {"action": "store_true", "help": text}
    if option.default not in (None, ""):
        text += f" (default: {option.default})"
    arguments: dict[str, Any] = {"type": option.kind, "default": option.default, "help": text}
    if option.many:
        arguments["nargs"] = "*"
    if option.choices is not None:
        arguments["choices"] = list(option.choices)
        known = [str(choice) for choice in option.choices if choice is not None]
        arguments["metavar"] = "{" + ",".join(known) + "}"
    else:
        arguments["metavar"] = _METAVARS.get(option.kind, "TEXT")
    if option.path:
        arguments["metavar"] = "PATH"
    return arguments


_METAVARS: dict[Any, str] = {int: "N", float: "X"}


def unknown_words(words: Sequence[str]) -> list[str]:
    """A line for each word of the command line that belongs to no option."""
    lines = []
    after_unknown = False
    for word in words:
        if word.startswith("-"):
            after_unknown = True
            name = word.split("=")[0].lstrip("-")
            hint = did_you_mean(name, OPTIONS, "--{}") or " --help lists all options."
            lines.append(f"{word.split('=')[0]} is not an option.{hint}")
        elif not after_unknown:
            lines.append(
                f"{word!r} belongs to no option. A value with spaces in it needs quotes around it."
            )
    return lines
