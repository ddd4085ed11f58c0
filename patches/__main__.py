"""`python -m patches apply|status|revert --target PATH/TO/sd-scripts`."""

from __future__ import annotations

import argparse
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from . import status
from .apply import carry_out, describe, plan_apply
from .errors import Refusal
from .revert import revert
from .tree import RECORD, Tree, find_tree


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, or nothing to do; 1 refused; 130 interrupted by Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the console cannot show
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(argv)
    try:
        said = _run(options, find_tree(options.target))
    except Refusal as refusal:
        print(f"{options.command}: {refusal}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"{options.command}: {error.filename}: {error.strerror}. Mend that and call the "
            "command again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(
            f"{options.command}: interrupted. `status` tells what is there; the command can be "
            "called again.",
            file=sys.stderr,
        )
        return 130
    print(said)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m patches",
        description="Put HinaAdamW and its family into your own sd-scripts folder.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("apply", "copy the optimizers there and add three marked lines to two files"),
        ("status", "say what is applied, which version, and what was edited since"),
        ("revert", "take everything out again, to the byte"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--target", type=Path, required=True, metavar="DIR", help="the folder of sd-scripts"
        )
        if name == "apply":
            command.add_argument(
                "--dry-run", action="store_true", help="only show what it would do"
            )
    return parser


def _run(options: argparse.Namespace, tree: Tree) -> str:
    """Do it; what to say of it."""
    if options.command == "apply":
        return _apply(tree, options.dry_run)
    return _revert(tree) if options.command == "revert" else status.describe(tree)


def _apply(tree: Tree, dry_run: bool) -> str:
    plan = plan_apply(tree)
    if dry_run:
        done = status.describe(tree) if plan is None else describe(plan)
        return f"{done}\n\nNothing was changed (--dry-run)."
    if plan is None:
        tree.forget_unfinished(RECORD)  # of a revert that was killed before its first change
        return status.describe(tree)
    carry_out(tree, plan)
    return (
        f"{status.describe(tree)}\n"
        "Try it: --optimizer_type HinaAdamW. The log then says how many parameters have names. "
        f"To undo: python -m patches revert --target {shlex.quote(str(tree.root))}"
    )


def _revert(tree: Tree) -> str:
    edited = revert(tree)
    if edited is None:
        return f"{tree.root}: the plugin is not applied; nothing to revert."
    kept = "".join(f"\n  {path} keeps the edits that you made to it" for path in edited)
    return f"{tree.root}: the plugin is out, and the folder as it was before.{kept}"


if __name__ == "__main__":
    sys.exit(main())
