"""`python -m patches apply|status|revert --target PATH/TO/sd-scripts`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import status
from .apply import carry_out, describe, plan_apply
from .errors import Refusal
from .record import PATH
from .revert import revert
from .tree import Tree, find_tree


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, or nothing to do; 1 refused."""
    options = _parser().parse_args(argv)
    try:
        tree = find_tree(options.target)
        if options.command == "apply":
            said = _apply(tree, options.dry_run)
        elif options.command == "revert":
            said = _revert(tree)
        else:
            said = status.describe(tree)
    except Refusal as refusal:
        print(f"{options.command}: {refusal}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"{options.command}: {error.filename}: {error.strerror}. Mend that and call the "
            "command again: it goes on where this one stopped.",
            file=sys.stderr,
        )
        return 1
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


def _apply(tree: Tree, dry_run: bool) -> str:
    plan = plan_apply(tree)
    if dry_run and plan:
        return f"{describe(plan, tree)}\n\nNothing was changed (--dry-run)."
    if plan is None:
        tree.forget_unfinished(PATH)  # of a revert that was killed before its first change
        return status.describe(tree)
    carry_out(tree, plan)
    return (
        f"{status.describe(tree)}\n"
        "Try it: --optimizer_type HinaAdamW. The log then says how many parameters have names. "
        f"To undo: python -m patches revert --target {tree.root}"
    )


def _revert(tree: Tree) -> str:
    edited = revert(tree)
    if edited is None:
        return f"{tree.root}: the plugin is not applied; nothing to revert."
    kept = "".join(f"\n  {path} keeps the edits that you made to it" for path in edited)
    return f"{tree.root}: the plugin is out, and the folder as it was before.{kept}"


if __name__ == "__main__":
    sys.exit(main())
