"""What to train on: a dataset config, folders of pictures or a metadata file → DatasetSpec.

Three sources, as in sd-scripts: `--dataset_config` (TOML or JSON), `--train_data_dir` and
`--reg_data_dir` (folders named like `10_cat`: repeats, then the words that stand in for a missing
caption), or `--in_json` (captions in a metadata file). A value is looked up in the subset, then its
dataset, then [general], then the command line.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.training.buckets import Buckets, Size
from library.training.config_text import read_table
from library.training.dataset_keys import DATASET_KEYS, SUBSET_KEYS, Level, read_level
from library.training.errors import UserError
from library.training.numbered_folders import numbered_folders
from library.training.options import Options
from library.training.paths import missing


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of pictures, or one metadata file, and how it is trained on."""

    image_dir: str | None = None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    cache_info: bool = False
    alpha_mask: bool = False
    num_repeats: int = 1
    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    color_aug: bool = False
    flip_aug: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    random_crop: bool = False
    resize_interpolation: str | None = None
    validation_seed: int | None = None
    validation_split: float = 0.0
    custom_attributes: dict[str, Any] = field(default_factory=dict)  # carried along

    @property
    def source(self) -> str:
        """The folder or file that the pictures come from."""
        return self.metadata_file or self.image_dir or ""

    @property
    def varies_pictures(self) -> bool:
        """Whether a picture looks different each time, so that its latents cannot be cached."""
        return self.color_aug or self.random_crop or self.face_crop_aug_range is not None

    def for_validation(self) -> SubsetSpec:
        """The same pictures with nothing left to chance, each once."""
        return dataclasses.replace(
            self,
            num_repeats=1,
            shuffle_caption=False,
            caption_dropout_rate=0.0,
            caption_dropout_every_n_epochs=0,
            caption_tag_dropout_rate=0.0,
            token_warmup_step=0,
            color_aug=False,
            flip_aug=False,
            face_crop_aug_range=None,
            random_crop=False,
        )


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that are trained on at one resolution and batch size."""

    subsets: tuple[SubsetSpec, ...]
    resolution: Size  # (width, height)
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    prior_loss_weight: float = 1.0
    notes: tuple[str, ...] = ()  # what the user should know, though it is no mistake

    @property
    def buckets(self) -> Buckets | None:
        """The rule for aspect-ratio buckets; None where everything has one size."""
        if not self.enable_bucket:
            return None
        return Buckets(
            self.resolution,
            self.min_bucket_reso,
            self.max_bucket_reso,
            self.bucket_reso_steps,
            self.bucket_no_upscale,
        )


def read_datasets(options: Options) -> list[DatasetSpec]:
    """The datasets that the options describe; UserError lists everything that is wrong."""
    problems: list[str] = []
    notes: list[str] = []
    tables, general = _tables(options, problems, notes)
    defaults = {**_command_line(options, problems), **general}
    datasets = [
        _dataset(table, defaults, where, options, problems, notes) for where, table in tables
    ]
    if problems:
        raise UserError.listing(problems)
    specs = [spec for spec in datasets if spec is not None]
    _note_useless_masking(specs, options, notes)
    return [dataclasses.replace(specs[0], notes=specs[0].notes + tuple(notes)), *specs[1:]]


# The table of each dataset, and how messages name its place.
Tables = list[tuple[str, Mapping[str, Any]]]


def _tables(
    options: Options, problems: list[str], notes: list[str]
) -> tuple[Tables, dict[str, Any]]:
    """The tables of the datasets, and the values of [general]."""
    if options.dataset_config is not None:
        _note_ignored(options, notes)
        return _config_tables(Path(options.dataset_config), problems)
    subsets: list[dict[str, Any]] = []
    folder = options.train_data_dir
    if options.in_json is not None:
        if not os.path.isfile(options.in_json):
            problems.append(missing("--in_json", options.in_json, "file"))
        elif folder is not None and not os.path.isdir(folder):
            problems.append(missing("--train_data_dir", folder, "folder"))
        else:
            named = {"image_dir": folder} if folder is not None else {}
            subsets.append({"metadata_file": options.in_json, **named})
    elif folder is not None:
        subsets += numbered_folders("--train_data_dir", folder, False, problems, notes)
        subsets += numbered_folders("--reg_data_dir", options.reg_data_dir, True, problems, notes)
    else:
        problems.append(
            "there is nothing to train on: give --dataset_config, or --train_data_dir with folders "
            "of pictures in it, or --in_json"
        )
    return [("the dataset", {"subsets": subsets})] if subsets else [], {}


def _config_tables(path: Path, problems: list[str]) -> tuple[Tables, dict[str, Any]]:
    config = read_table(path)
    general = read_level(config.get("general", {}), Level.GENERAL, f"{path}: general", problems)
    for name in sorted(config.keys() - {"general", "datasets"}):
        problems.append(
            f"{path}: {name} does not belong at the top level: the sections are [general], "
            "[[datasets]] and [[datasets.subsets]]"
        )
    tables = config.get("datasets", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        problems.append(
            f"{path}: datasets: write [[datasets]] in double brackets (a list of tables)"
        )
        tables = []
    elif not tables:
        problems.append(f"{path}: there is no [[datasets]] with [[datasets.subsets]] in it")
    return [(f"{path}: datasets[{index}]", table) for index, table in enumerate(tables)], general


def _command_line(options: Options, problems: list[str]) -> dict[str, Any]:
    """The options of the command line that datasets fall back on, under the config's names."""
    renamed = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
    values: dict[str, Any] = {}
    for key, reader in {**DATASET_KEYS, **SUBSET_KEYS}.items():
        option = renamed.get(key, key)
        value = getattr(options, option, None)
        if key == "caption_extension" and options.caption_extention is not None:
            value = options.caption_extention
        if value is None:
            continue
        try:
            values[key] = reader(value)
        except ValueError as expected:
            problems.append(f"--{option}: expected {expected}, not {value!r}")
    values["alpha_mask"] = options.alpha_mask
    values["conditioning_data_dir"] = masks = options.conditioning_data_dir
    if masks is not None and not os.path.isdir(masks):
        problems.append(missing("--conditioning_data_dir", masks, "folder"))
    if masks is not None and not options.masked_loss:
        problems.append("--conditioning_data_dir needs --masked_loss")
    return values


def _dataset(
    table: Mapping[str, Any],
    defaults: Mapping[str, Any],
    where: str,
    options: Options,
    problems: list[str],
    notes: list[str],
) -> DatasetSpec | None:
    """One [[datasets]] table with its subsets; None where it is too wrong to be built."""
    before = len(problems)
    tables = table.get("subsets", [])
    if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        problems.append(
            f"{where}: write [[datasets.subsets]] in double brackets (a list of tables)"
        )
        return None
    if not tables:
        problems.append(f"{where} has no [[datasets.subsets]]: add one with an image_dir")
    with_metadata = sum("metadata_file" in each for each in tables)
    if 0 < with_metadata < len(tables):
        problems.append(
            f"{where}: subsets with and without metadata_file cannot share a dataset: put them in "
            "two [[datasets]]"
        )
    level = Level.METADATA_DATASET if with_metadata else Level.DATASET
    own = {key: value for key, value in table.items() if key != "subsets"}
    values = {**defaults, **read_level(own, level, where, problems)}
    subsets: dict[str, SubsetSpec] = {}
    for index, each in enumerate(tables):
        place = f"{where}.subsets[{index}]"
        subset = _subset(each, values, place, options, problems)
        if subset is None:
            continue
        if subset.num_repeats < 1:
            notes.append(f"{place} ({subset.source}) is left out: its num_repeats is 0")
        elif subset.source in subsets:
            notes.append(f"{place} is left out: {subset.source} is already in this dataset")
        else:
            subsets[subset.source] = subset
    if tables and not subsets and len(problems) == before:
        problems.append(f"{where}: every subset has num_repeats 0, so there is nothing to train on")
    if values.get("resolution") is None:
        problems.append(f"{where}: no resolution is set: give --resolution, or resolution there")
    if len(problems) > before:
        return None
    spec = _fill(DatasetSpec, values, subsets=tuple(subsets.values()))
    return _check_buckets(spec, where, problems)


def _subset(
    table: Mapping[str, Any],
    defaults: Mapping[str, Any],
    where: str,
    options: Options,
    problems: list[str],
) -> SubsetSpec | None:
    """One [[datasets.subsets]] table, with what it inherits."""
    before = len(problems)
    level = Level.METADATA_SUBSET if "metadata_file" in table else Level.SUBSET
    own = read_level(table, level, where, problems)
    values = {**defaults, **own}
    if own.get("conditioning_data_dir") and own.get("alpha_mask"):
        problems.append(f"{where}: alpha_mask and conditioning_data_dir exclude each other")
    if values.get("conditioning_data_dir"):
        values["alpha_mask"] = False
        if values.get("is_reg") and "conditioning_data_dir" not in own:
            values["conditioning_data_dir"] = None  # the command line's masks are the subject's
    if level is Level.SUBSET and "image_dir" not in table:
        problems.append(f"{where}: image_dir is missing: name the folder with the pictures")
    for key in ("image_dir", "conditioning_data_dir"):
        folder = own.get(key)
        if folder is not None and not os.path.isdir(folder):
            problems.append(_missing_folder(f"{where}.{key}", folder, options.dataset_config))
    if own.get("conditioning_data_dir") and not options.masked_loss:
        problems.append(f"{where}: conditioning_data_dir needs --masked_loss")
    metadata = own.get("metadata_file")
    if metadata is not None and not os.path.isfile(metadata):
        problems.append(missing(f"{where}.metadata_file", metadata, "file"))
    return _fill(SubsetSpec, values) if len(problems) == before else None


def _missing_folder(where: str, folder: str, config: str | None) -> str:
    """What to say of a folder that a config names and that is not there."""
    text = missing(where, folder, "folder")
    if os.path.isabs(folder) or config is None:
        return text
    text += f" It was looked for in the current folder, {os.getcwd()}"
    beside = Path(config).parent / folder
    return f"{text}; it does exist beside the config: {beside}" if beside.is_dir() else text


def _fill(spec: type[Any], values: Mapping[str, Any], **more: Any) -> Any:
    """A spec from those of `values` that it has fields for."""
    names = {each.name for each in dataclasses.fields(spec)}
    return spec(**{key: value for key, value in values.items() if key in names}, **more)


def _check_buckets(spec: DatasetSpec, where: str, problems: list[str]) -> DatasetSpec:
    """`spec` with its bucket limits moved outwards to whole steps."""
    if not spec.enable_bucket:
        return spec
    steps = spec.bucket_reso_steps
    low = spec.min_bucket_reso // steps * steps
    high = -(-spec.max_bucket_reso // steps) * steps
    notes = [
        f"{where}: {name} {old} is no multiple of bucket_reso_steps {steps}: {new} is used"
        for name, old, new in (
            ("min_bucket_reso", spec.min_bucket_reso, low),
            ("max_bucket_reso", spec.max_bucket_reso, high),
        )
        if old != new and not spec.bucket_no_upscale
    ]
    width, height = spec.resolution
    if min(width, height) < low:
        problems.append(
            f"{where}: min_bucket_reso {low} is above the resolution {width}×{height}: lower it"
        )
    if max(width, height) > high:
        problems.append(
            f"{where}: max_bucket_reso {high} is below the resolution {width}×{height}: raise it"
        )
    if min(width, height) < steps:
        problems.append(
            f"{where}: bucket_reso_steps {steps} is above the resolution {width}×{height}: lower it"
        )
    # Where the shortest side would be nothing, one step is the least a bucket can have.
    return dataclasses.replace(
        spec,
        min_bucket_reso=max(low, steps),
        max_bucket_reso=high,
        notes=spec.notes + tuple(notes),
    )


def _note_ignored(options: Options, notes: list[str]) -> None:
    names = ("train_data_dir", "reg_data_dir", "in_json")
    ignored = [f"--{name}" for name in names if getattr(options, name) is not None]
    if ignored:
        notes.append(f"{', '.join(ignored)} not used: --dataset_config says what to train on")


def _note_useless_masking(specs: list[DatasetSpec], options: Options, notes: list[str]) -> None:
    subsets = [subset for spec in specs for subset in spec.subsets]
    masked = any(subset.alpha_mask or subset.conditioning_data_dir for subset in subsets)
    if options.masked_loss and not masked:
        notes.append(
            "--masked_loss changes nothing: no subset has conditioning_data_dir or alpha_mask"
        )
