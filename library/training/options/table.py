"""All options together."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.training.options.data import (
    CacheOptions,
    CaptionOptions,
    DatasetOptions,
    PictureOptions,
)
from library.training.options.fields import read_options
from library.training.options.learning import (
    LossOptions,
    NoiseOptions,
    OptimizerOptions,
    ScheduleOptions,
)
from library.training.options.model import ModelOptions, NetworkOptions
from library.training.options.output import (
    ConfigOptions,
    HubOptions,
    LoggingOptions,
    MetadataOptions,
    SavingOptions,
)
from library.training.options.run import (
    DeepSpeedOptions,
    RunOptions,
    SamplingOptions,
    SpeedOptions,
    ValidationOptions,
)

TOPICS: tuple[type, ...] = (
    ConfigOptions,
    ModelOptions,
    NetworkOptions,
    DatasetOptions,
    PictureOptions,
    CaptionOptions,
    CacheOptions,
    RunOptions,
    OptimizerOptions,
    ScheduleOptions,
    NoiseOptions,
    LossOptions,
    SpeedOptions,
    SavingOptions,
    SamplingOptions,
    ValidationOptions,
    LoggingOptions,
    MetadataOptions,
    HubOptions,
    DeepSpeedOptions,
)

OPTIONS = read_options(TOPICS)


@dataclass
class Options(
    ConfigOptions,
    ModelOptions,
    NetworkOptions,
    DatasetOptions,
    PictureOptions,
    CaptionOptions,
    CacheOptions,
    RunOptions,
    OptimizerOptions,
    ScheduleOptions,
    NoiseOptions,
    LossOptions,
    SpeedOptions,
    SavingOptions,
    SamplingOptions,
    ValidationOptions,
    LoggingOptions,
    MetadataOptions,
    HubOptions,
    DeepSpeedOptions,
):
    """Every option of a run by its stock name, with stock's default.

    `given` names those the user set, on the command line or in a config file; `notes` are remarks
    from reading them. Neither is an option.
    """

    def __post_init__(self) -> None:
        self.given: frozenset[str] = frozenset()
        self.notes: tuple[str, ...] = ()

    @classmethod
    def from_values(cls, values: Mapping[str, Any], notes: Iterable[str] = ()) -> Options:
        """Options with `values` set and counted as given; unknown names become attributes too."""
        options = cls().changed(values)
        options.given = frozenset(values)
        options.notes = tuple(notes)
        return options

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace | Options) -> Options:
        """Options from what `setup_parser().parse_args()` returns, which may hold fewer or more.

        Fewer are filled up with defaults; more stay attributes, for trainers built on this one.
        """
        if isinstance(namespace, cls):
            return namespace
        values = {name: _from_stock(name, value) for name, value in vars(namespace).items()}
        options = cls().changed(values)
        options.given = frozenset(
            name
            for name, value in values.items()
            if name not in OPTIONS or value != OPTIONS[name].default
        )
        return options

    def changed(self, values: Mapping[str, Any]) -> Options:
        """A copy with `values` set; `given` and `notes` stay as they are."""
        result = copy.copy(self)
        for name, value in values.items():
            setattr(result, name, value)
        return result


def _from_stock(name: str, value: Any) -> Any:
    """`value` in the form `Options` keeps it: stock turns some options into paths and tuples."""
    if isinstance(value, Path):
        return str(value)
    if name in ("resolution", "face_crop_aug_range") and isinstance(value, (tuple, list)):
        return ",".join(str(number) for number in value)
    if name in OPTIONS and OPTIONS[name].many and value is not None:
        return list(value) if isinstance(value, (tuple, list)) else [value]
    return value
