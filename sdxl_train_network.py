"""Train an adapter for Stable Diffusion XL: `python sdxl_train_network.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from library.training.command import run_command
from library.training.options import setup_parser
from library.training.trainer import SdxlNetworkTrainer

__all__ = ["SdxlNetworkTrainer", "main", "setup_parser"]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(argv, sdxl=True)


if __name__ == "__main__":
    sys.exit(main())
