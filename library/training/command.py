"""The command line's frame: parse, train, and answer the user's mistakes without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from library.training.config import parse
from library.training.cpu_processes import start_processes_asked_for
from library.training.errors import UserError
from library.training.log import hush_imports

USER_ERROR = 2
INTERRUPTED = 130  # what a shell reports after Ctrl-C


def run_command(argv: Sequence[str] | None, sdxl: bool) -> int:
    """Run one training from a command line and return its exit status.

    0 is success, 2 a mistake of the user's that was explained, 130 a run ended by Ctrl-C.
    """
    try:
        options = parse(argv)
        if argv is None:
            start_processes_asked_for(sys.argv)
        hush_imports()
        # Only now, so that a misspelt option is answered at once: torch takes seconds to import.
        from library.training.trainer import NetworkTrainer, SdxlNetworkTrainer

        trainer = SdxlNetworkTrainer() if sdxl else NetworkTrainer()
        finished = trainer.train(options)
    except UserError as error:
        # Every process finds the same mistake; one of them says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\nstopped at once; what was saved before is whole", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0 if finished else INTERRUPTED
