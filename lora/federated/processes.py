"""Clients as processes beside a server, on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .server import FederatedServer

ROOT = Path(__file__).resolve().parents[2]
GOODBYE = 20.0  # seconds for a client to end by itself


@contextmanager
def clients_beside(server: FederatedServer, options: Sequence[str]) -> Iterator[None]:
    """All of a run's clients, each with its share of the cores; behind it they have ended.

    Args:
        server: open already, so that its address is known.
        options: of the command line, the same for each.
    """
    number = server.settings.clients
    threads = max(1, (os.cpu_count() or 1) // number)
    # Flower and PyTorch count threads of their own; what the user has set counts first.
    environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)
    address = server.address
    command = [sys.executable, "-m", "lora.federated", "client", f"--address={address}", *options]
    running = [
        subprocess.Popen([*command, f"--number={k}"], cwd=ROOT, env=environment)
        for k in range(number)
    ]
    try:
        yield
        for process in running:
            process.wait(GOODBYE)
    except subprocess.TimeoutExpired:
        pass  # ended below, as after an error
    finally:
        for process in running:
            process.kill()
            process.wait()
