"""What only a new process can tell: the cost of the first step, and a step's peak of memory.

`compile_cost` and `peak_memory` start this file as a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # `library`, which is not installed

import torch
from contenders import BY_KEY, LR, REFERENCE
from stopwatch import Runner
from workload import Workload, sdxl_lora

from library.optim.native.build import compilations

# Where compiled code is kept: ours, and torch.compile's.
CACHES = ("HINA_CACHE", "TORCHINDUCTOR_CACHE_DIR")


def compile_cost(key: str, modules: int | None, threads: int, steps: int) -> dict[str, Any]:
    """Seconds of the first step without and with a filled cache, and compilations in `steps`."""
    with tempfile.TemporaryDirectory(prefix="hina-benchmark-") as folder:
        caches = {name: str(Path(folder) / name.lower()) for name in CACHES}
        cold = _run("compile", key, modules, threads, steps, caches)
        warm = _run("compile", key, modules, threads, 1, caches)
    return {**cold, "first_step_s_cached": warm["first_step_s"]}


def peak_memory(key: str, modules: int | None, threads: int) -> dict[str, Any]:
    """What a step takes at its peak, and an optimizer all the time, relative to the gradients."""
    measured: dict[str, Any] = _run("memory", key, modules, threads, 1, {})
    return measured


def _run(
    what: str, key: str, modules: int | None, threads: int, steps: int, caches: dict[str, str]
) -> dict[str, Any]:
    order = {"what": what, "key": key, "modules": modules, "threads": threads, "steps": steps}
    finished = subprocess.run(
        [sys.executable, __file__, json.dumps(order)],
        env=os.environ | caches,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return told


def _tell_compile_cost(key: str, workload: Workload, steps: int) -> dict[str, Any]:
    """`steps` steps as in training: a cosine schedule, half way through it the decay's transition,
    and now and then gradients that are missing, a few or half of them."""
    # What the first step of any optimizer makes torch import is not counted.
    Runner(REFERENCE, Workload(sdxl_lora(1))).step_on_same_gradients()
    parameters = workload.new_parameters()
    started = time.perf_counter()
    runner = Runner(BY_KEY[key], workload, parameters, wd_transition_steps=max(1, steps // 2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(runner.optimizer, steps, LR / 100)
    runner.step_on_same_gradients()
    first_step = time.perf_counter() - started
    at_first = compilations()
    later = []
    for step in range(2, steps + 1):
        schedule.step()
        missing = 0.5 if step % 50 == 25 else 0.03 if step % 10 == 5 else 0.0
        workload.give_gradients(runner.parameters, missing)
        later.append(runner.step())
    return {
        "first_step_s": first_step,
        "compilations_first_step": at_first,
        "compilations": compilations(),
        "steps": steps,
        "median_step_ms": statistics.median(later) if later else None,
        "slowest_later_step_ms": max(later, default=None),
    }


def _tell_peak_memory(key: str, workload: Workload) -> dict[str, Any]:
    """Linux only: the kernel counts what the process has in memory, and the most it ever had."""
    small = Runner(BY_KEY[key], Workload(sdxl_lora(1)))  # loads the code, which is not counted
    for _ in range(3):
        small.step_on_same_gradients()
    parameters = workload.new_parameters()
    before = _settled()
    runner = Runner(BY_KEY[key], workload, parameters)
    for _ in range(3):
        runner.step_on_same_gradients()
    held = _settled()
    with Peak() as peak:
        runner.step_on_same_gradients()
    gradients = 4 * workload.parameters
    return {
        "gradients_mb": gradients / 2**20,
        "held_mb": (held - before) / 2**20,
        "held_of_gradients": (held - before) / gradients,
        "peak_mb": peak.mebibytes,
        "peak_of_gradients": peak.mebibytes * 2**20 / gradients,
    }


class Peak:
    """What a piece of code takes of memory at its peak, beyond what was held before (Linux only).

    Attributes:
        mebibytes: known behind the `with` block.
    """

    mebibytes = 0.0

    def __enter__(self) -> Peak:
        self._before = _settled()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        return self

    def __exit__(self, *_: object) -> None:
        self.mebibytes = (_resident("VmHWM") - self._before) / 2**20


def _settled() -> int:
    """Bytes in memory, once what was freed is given back to the kernel: a step that finds it still
    there would seem to need none."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _resident("VmRSS")


def _resident(which: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most since the last reset (VmHWM)."""
    status = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith(f"{which}:"))


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    workload = Workload(sdxl_lora(order["modules"]))
    if order["what"] == "compile":
        told = _tell_compile_cost(order["key"], workload, order["steps"])
    else:
        told = _tell_peak_memory(order["key"], workload)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
