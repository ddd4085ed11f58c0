"""How well optimizers train the quickstart's LoKr, each at several learning rates.

    python benchmarks/quickstart_losses.py                     # two optimizers, half an hour
    python benchmarks/quickstart_losses.py --only AdamW --lr 1e-3 1e-2 --seeds 1

Each figure is the validation loss of a run of train_network.py with configs/quickstart.toml: of six
pictures that are not trained on, always with the same noise and time steps. AdaptiveHinaAdamW's
lr_mask is told the scale of the learning rate (max_lr twice and lr_bump a five-hundredth of it),
and its warm-up and discoveries fit into 80 steps. The validation loss before training is that of a
learning rate of 1e-9.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
OPTIMIZERS = (
    "AdamW",
    "HinaAdamW",
    "AdaptiveHinaAdamW",
    "Automagic_CameAMP",
    "Automagic_CameAMP8bit",
    "Automagic_CameAMP_COptim8bit",
    "Automagic_CameAMP_Improved_8Bit",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=["AdamW", OPTIMIZERS[2]])
    parser.add_argument("--lr", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", type=int, default=2, help="runs for each figure")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    told = []
    print(f"| optimizer | lr | validation loss, mean of {arguments.seeds} | each |")
    print("|---|---:|---:|---|", flush=True)
    for optimizer in arguments.only:
        for lr in arguments.lr:
            losses = [train(optimizer, lr, arguments.steps, s) for s in range(arguments.seeds)]
            told.append({"optimizer": optimizer, "lr": lr, "losses": losses})
            each = ", ".join(f"{loss:.5f}" for loss in losses)
            print(f"| {optimizer} | {lr:g} | {statistics.mean(losses):.5f} | {each} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return 0


def arguments_of(optimizer: str, lr: float, steps: int) -> list[str]:
    """What an optimizer needs to be told for a short run at this learning rate."""
    mask = [f"max_lr={2 * lr}", f"lr_bump={lr / 500}", f"warmup_steps={steps // 2}"]
    if optimizer == "AdaptiveHinaAdamW":
        return [*mask, f"relationship_discovery_interval={max(1, steps // 4)}"]
    return mask if optimizer.startswith("Automagic_CameAMP") else []


def train(optimizer: str, lr: float, steps: int, seed: int) -> float:
    """The validation loss of a run; NaN if it diverged."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.toml")
        settings = (ROOT / "configs" / "quickstart.toml").read_text("utf-8")
        config.write_text(re.sub(r"\[samples\][^[]*", "", settings), "utf-8")
        options = {
            "config_file": config,
            "optimizer_type": optimizer,
            "learning_rate": lr,
            "max_train_steps": steps,
            "validate_every_n_steps": steps,
            "seed": 42 + seed,
            "output_dir": Path(folder, "out"),
            "logging_dir": Path(folder, "logs"),
        }
        command = [sys.executable, "train_network.py"]
        command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        if more := arguments_of(optimizer, lr, steps):
            command += ["--optimizer_args", *more]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode and "NaN or infinite" in ran.stderr:
            return math.nan
        if ran.returncode:
            raise RuntimeError(ran.stderr[-4000:])
        return last_validation_loss(Path(folder))


def last_validation_loss(folder: Path) -> float:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: list[tuple[int, float]] = []
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "loss/validation/step_average" in events.Tags()["scalars"]:
            found = events.Scalars("loss/validation/step_average")
            values += [(event.step, event.value) for event in found]
    return max(values, key=lambda found: found[0])[1]


if __name__ == "__main__":
    sys.exit(main())
