"""Train an adapter for Stable Diffusion XL: `python sdxl_train_network.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from library.training.command import run_command
from library.training.options import setup_parser

if TYPE_CHECKING:
    from library.training.trainer import SdxlNetworkTrainer

__all__ = ["SdxlNetworkTrainer", "main", "setup_parser"]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(argv, sdxl=True)


def __getattr__(name: str) -> Any:
    """The trainer class, imported when it is asked for: a typo is answered without torch."""
    if name == "SdxlNetworkTrainer":
        from library.training import trainer

        return trainer.SdxlNetworkTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
