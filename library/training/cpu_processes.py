"""Several processes on CPUs, as `accelerate launch --num_processes N --cpu` asks for them.

accelerate's launcher (seen in 1.15) starts a single process on CPUs, whatever `--num_processes`
says, unless MPI is set up; nothing in that process's environment tells what was asked for. It is
read from the launcher's command line instead, and the processes are started through torchrun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import psutil


def start_processes_asked_for(command: Sequence[str]) -> None:
    """Replace this process (`command`: script and arguments) by as many as were asked for."""
    # The launcher sets the first only for its single process; processes of torchrun have a rank.
    if os.environ.get("ACCELERATE_USE_CPU") != "True" or "RANK" in os.environ:
        return
    launcher = psutil.Process().parent()
    count = processes_asked_for(launcher.cmdline() if launcher is not None else [])
    if count > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *torchrun, *command])


def processes_asked_for(launcher: Sequence[str]) -> int:
    """N of the last `--num_processes N` on accelerate's command line, 1 without any."""
    count = 1
    for word, following in zip(launcher, [*launcher[1:], ""], strict=False):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes" and (value or following).isdigit():
            count = int(value or following)
    return count
