"""Where log lines go, and how they get along with progress bars."""

from __future__ import annotations

import logging
import os
import sys

from tqdm import tqdm

from library.training.errors import UserError
from library.training.options import Options

# Libraries that report every request, file or font at INFO.
CHATTY = ("absl", "diffusers", "filelock", "httpcore", "httpx", "matplotlib", "PIL", "urllib3")

# They warn at import of optional packages that nothing here uses.
WARN_OF_EXTRAS = ("bitsandbytes.backends.cpu.ops", "transformers.utils.import_utils")


class ConsoleHandler(logging.Handler):
    """Writes to stderr above a progress bar that is being drawn, instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def hush_imports() -> None:
    """Call before the libraries are imported: no lines about extras that nobody misses."""
    for name in WARN_OF_EXTRAS:
        logging.getLogger(name).setLevel(logging.ERROR)


def setup_logging(options: Options) -> None:
    """Set up the root logger by the options `--console_log_*`.

    In a run of several processes only the first one reports what it does; all report warnings.
    """
    level = logging.getLevelName(options.console_log_level or "INFO")
    if os.environ.get("RANK", "0") != "0":
        level = max(level, logging.WARNING)
    handler = _handler(options)
    plain = options.console_log_simple
    pattern = "%(message)s" if plain else "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(logging.Formatter(pattern, datefmt="%H:%M:%S"))
    root = logging.getLogger()
    for former in root.handlers[:]:
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(level)
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _handler(options: Options) -> logging.Handler:
    if not options.console_log_file:
        return ConsoleHandler()
    try:
        return logging.FileHandler(options.console_log_file, mode="w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--console_log_file: {options.console_log_file} can't be written "
            f"({error.strerror}). Name a file in a folder that exists."
        ) from error
