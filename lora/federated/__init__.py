"""Federated runs over Flower: `python -m lora.federated`."""

from __future__ import annotations

import os

from utils.packages import missing_package

# Flower tells its makers of every run, unless this says otherwise before it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

try:
    import flwr  # noqa: F401
except ModuleNotFoundError as error:
    raise missing_package(error) from error
