"""Clients as processes beside a server, on one machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

    from .server import FederatedServer

GOODBYE = 20.0  # seconds for a client to end by itself

# A client takes longest to import what it needs. Where a process may safely be forked behind its
# imports, one imports for all of them; elsewhere each does so for itself.
_FORKS = sys.platform == "linux"
_CONTEXT: ForkServerContext | SpawnContext = (
    multiprocessing.get_context("forkserver") if _FORKS else multiprocessing.get_context("spawn")
)


def begin_imports() -> None:
    """Start the process that clients are forked from: it imports while the caller does."""
    if _FORKS:
        _CONTEXT.set_forkserver_preload(["lora.federated.preload"])
        forkserver.ensure_running()


@contextmanager
def clients_beside(server: FederatedServer, options: Sequence[str]) -> Iterator[None]:
    """All of a run's clients, each with its share of the cores; behind it they have ended.

    Args:
        server: open already, so that its address is known.
        options: of the command line, the same for each.
    """
    number = server.settings.clients
    threads = max(1, (os.cpu_count() or 1) // number)
    words = ["client", f"--address={server.address}", *options]
    running = [
        _CONTEXT.Process(target=_client, args=([*words, f"--number={k}"], threads))
        for k in range(number)
    ]
    for process in running:
        process.start()
    try:
        yield
        for process in running:
            process.join(GOODBYE)
    finally:
        for process in running:
            process.kill()
            process.join()


def _client(words: Sequence[str], threads: int) -> None:
    """A client's process; Ctrl-C in the terminal, which all hear, is the server's matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from .__main__ import main

    if "OMP_NUM_THREADS" not in os.environ:  # what the user has set counts first
        torch.set_num_threads(threads)
    sys.exit(main(words))
