"""Whether 8-bit state trains as 32-bit state does: a LoRA on the model that comes with the project.

    python benchmarks/eight_bits.py                # 2,000 steps each, about half an hour
    python benchmarks/eight_bits.py --steps 200

Two runs of train_network.py on the quickstart's pictures, alike in all but `optim_bits`. The
validation loss is that of six pictures that are not trained on, always with the same noise and time
steps; the training loss is the mean over the last tenth of the steps. `min_8bit_size=0` puts every
tensor of the small model in 8 bits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from quickstart_losses import arguments_of

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", default="1e-3")
    parser.add_argument("--optimizer", default="HinaAdamW")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = {bits: Path(folder, str(bits)) for bits in (8, 32)}
        runs = [start(bits, where, arguments) for bits, where in folders.items()]
        codes = [run.wait() for run in runs]
        if any(codes):
            for where in folders.values():
                print((where / "log.txt").read_text("utf-8")[-4000:], file=sys.stderr)
            return 1
        losses = {bits: read_losses(where, arguments.steps) for bits, where in folders.items()}
    print("| loss | 8 bits | 32 bits | difference |\n|---|---:|---:|---:|")
    for name in losses[8]:
        eight, full = losses[8][name], losses[32][name]
        print(f"| {name} | {eight:.5f} | {full:.5f} | {100 * (eight / full - 1):+.2f} % |")
    return 0


def start(bits: int, folder: Path, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A run with moments of so many bits."""
    folder.mkdir()
    options = {
        "config_file": "configs/quickstart.toml",
        "network_module": "networks.lora",
        "optimizer_type": arguments.optimizer,
        "learning_rate": arguments.lr,
        "max_train_steps": arguments.steps,
        "validate_every_n_steps": max(1, arguments.steps // 10),
        "sample_every_n_steps": 10**6,
        "output_dir": folder / "out",
        "logging_dir": folder / "logs",
    }
    command = [sys.executable, "train_network.py"]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    own = arguments_of(arguments.optimizer, float(arguments.lr), arguments.steps)
    command += ["--optimizer_args", f"optim_bits={bits}", "min_8bit_size=0", *own]
    command += ["--network_args", "conv_dim=4"]
    # The two share the processor: threads of one would wait in a loop for those of the other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def read_losses(folder: Path, steps: int) -> dict[str, float]:
    """The last validation loss, and the mean training loss of the last tenth of the steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    last = [value for step, value in found["loss/current"] if step > 0.9 * steps]
    return {
        "validation, at the end": found["loss/validation/step_average"][-1][1],
        "training, last tenth": statistics.mean(last),
    }


if __name__ == "__main__":
    sys.exit(main())
