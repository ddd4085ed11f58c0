"""TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from library.training.errors import UserError
from library.training.options import Options
from library.training.toml_file import read_toml

log = logging.getLogger(__name__)

DEFAULT_NAME = "network_train"  # stock's: a folder under the logging folder, W&B's project
SECRETS = ("wandb_api_key", "huggingface_token")
# `--log_config` may end up public, so paths of this machine are left out as in stock.
PRIVATE_PATHS = (
    "pretrained_model_name_or_path",
    "vae",
    "tokenizer_cache_dir",
    "train_data_dir",
    "conditioning_data_dir",
    "reg_data_dir",
    "output_dir",
    "logging_dir",
)
# Options that only say how to log.
ABOUT_TRACKERS = ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config")
ABOUT_WANDB = ("wandb_run_name", "wandb_api_key")


def tracker_names(options: Options) -> list[str]:
    """Which trackers are asked for; `--logging_dir` alone means TensorBoard, as in stock."""
    if options.log_with == "all":
        return ["tensorboard", "wandb"]
    if options.log_with:
        return [options.log_with]
    return ["tensorboard"] if options.logging_dir else []


def check_logging(options: Options) -> list[str]:
    """What stands in the way of logging as asked, in words for the user; imports nothing heavy."""
    names = tracker_names(options)
    problems = []
    if "tensorboard" in names and not options.logging_dir:
        problems.append(
            f"--log_with {options.log_with} needs --logging_dir, a folder for the logs."
        )
    if "tensorboard" in names and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        problems.append("logging to TensorBoard needs its package: pip install tensorboard")
    if "wandb" in names and not find_spec("wandb"):
        problems.append(f"--log_with {options.log_with} needs a package: pip install wandb")
    if options.log_tracker_config:
        problems.extend(_check_tracker_config(Path(options.log_tracker_config)))
    return problems


def _check_tracker_config(path: Path) -> list[str]:
    if not path.is_file():
        return [f"--log_tracker_config: there is no file {path}."]
    try:
        tables = read_toml(path)
    except UserError as error:
        return [f"--log_tracker_config: {error}"]
    return [
        f"--log_tracker_config: {path}: '{name}' must be a table named after a tracker, "
        "[tensorboard] or [wandb]."
        for name, table in tables.items()
        if name not in ("tensorboard", "wandb") or not isinstance(table, dict)
    ]


class Trackers:
    """The trackers of one run. For the main process only; without any, every call does nothing."""

    def __init__(self, options: Options) -> None:
        self._trackers: list[Any] = []
        names = tracker_names(options)
        _warn_of_unused(options, names)
        if not names:
            return
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        project = options.log_tracker_name or DEFAULT_NAME
        arguments = _tracker_arguments(options)
        folder = _run_folder(options)
        if "tensorboard" in names:
            keywords = arguments.get("tensorboard", {})
            self._trackers.append(TensorBoardTracker(project, folder, **keywords))
        if "wandb" in names:
            _prepare_wandb(options, folder)
            keywords = {"name": options.wandb_run_name, **arguments.get("wandb", {})}
            self._trackers.append(WandBTracker(project, **keywords))
        for tracker in self._trackers:
            tracker.start()
            if tracker.name == "wandb":
                for axis in ("epoch", "global_step"):
                    tracker.tracker.define_metric(axis, hidden=True)
            if options.log_config:
                tracker.store_init_configuration(public_config(options))

    def log(self, values: Mapping[str, float], step: int, epoch: int, position: int) -> None:
        """Log scalars. `position` is their place on TensorBoard's axis: a step or an epoch."""
        for tracker in self._trackers:
            if tracker.name == "wandb":
                tracker.log({**values, "global_step": step, "epoch": epoch})
            else:
                # Not through the tracker's own log, which waits for the disk every time.
                for name, value in values.items():
                    tracker.tracker.add_scalar(name, value, global_step=position)

    def log_pictures(self, pictures: Mapping[str, tuple[Path, str]], step: int) -> None:
        """Log picture files with their captions under their names."""
        for tracker in self._trackers:
            if tracker.name == "wandb":
                import wandb

                images = {
                    name: wandb.Image(str(path), caption=caption)
                    for name, (path, caption) in pictures.items()
                }
                tracker.log(images, commit=False)  # they belong to the step logged next
            else:
                for name, (path, _) in pictures.items():
                    pixels = np.asarray(Image.open(path).convert("RGB"))
                    tracker.tracker.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Bring to disk what is still in memory."""
        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                tracker.tracker.flush()

    def close(self) -> None:
        """End the run in every tracker."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def public_config(options: Options) -> dict[str, bool | str | float | int]:
    """The options as trackers take them, without secrets and paths; lists as text."""
    return {
        name: str(value) if isinstance(value, list) else value
        for name, value in asdict(options).items()
        if value is not None and name not in (*SECRETS, *PRIVATE_PATHS)
    }


def _run_folder(options: Options) -> str:
    """A folder of its own for every run, as in stock; "" where W&B alone keeps the logs."""
    if not options.logging_dir:
        return ""
    moment = time.strftime("%Y%m%d%H%M%S")
    return str(Path(options.logging_dir) / f"{options.log_prefix or ''}{moment}")


def _tracker_arguments(options: Options) -> dict[str, dict[str, Any]]:
    return read_toml(Path(options.log_tracker_config)) if options.log_tracker_config else {}


def _prepare_wandb(options: Options, folder: str) -> None:
    import wandb

    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        os.environ["WANDB_DIR"] = folder
    if options.wandb_api_key:
        wandb.login(key=options.wandb_api_key)


def _warn_of_unused(options: Options, names: list[str]) -> None:
    idle = [] if names else list(ABOUT_TRACKERS)
    idle += [] if "wandb" in names else list(ABOUT_WANDB)
    for name in idle:
        if getattr(options, name):
            log.warning("--%s changes nothing: no tracker that reads it is on (--log_with)", name)
