"""What an adapter file says about itself: stock's `ss_*` keys and ModelSpec's `modelspec.*`.

Tools find files by these keys and hashes, so names, formats and hashes are stock's; the keys of
ModelSpec are https://github.com/Stability-AI/ModelSpec, version 1.0.1.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import mimetypes
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor

from library.optim.registry import parse_optimizer_args, relative_step
from library.training.dataset_keys import factor_range, size
from library.training.options import Options

Kind = Literal["sd1", "sd2", "sdxl"]

# What stays with --no_metadata: enough to load the file.
MINIMUM_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
# Options that are written as they are, under ss_ and their own name …
_PLAIN_OPTIONS = """
output_name learning_rate text_encoder_lr unet_lr lr_warmup_steps lr_scheduler max_train_steps
gradient_checkpointing gradient_accumulation_steps max_grad_norm mixed_precision full_fp16 fp8_base
fp8_base_unet v2 clip_skip max_token_length cache_latents lowram seed training_comment
network_module network_dim network_alpha network_dropout scale_weight_norms
noise_offset noise_offset_random_strength adaptive_noise_scale multires_noise_iterations
multires_noise_discount ip_noise_gamma ip_noise_gamma_random_strength zero_terminal_snr
loss_type huber_schedule huber_scale huber_c min_snr_gamma prior_loss_weight
caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range
resize_interpolation validation_seed validation_split max_validation_steps
validate_every_n_epochs validate_every_n_steps
"""
# … those that only a run without a dataset config has for all of its data …
_DATA_OPTIONS = "resolution color_aug flip_aug random_crop shuffle_caption keep_tokens"
# … and those that become keys of ModelSpec as they are, without metadata_.
_MODEL_SPEC_OPTIONS = """
author description license tags usage_hint merged_from trigger_phrase preprocessor
is_negative_embedding
"""


@dataclass
class SubsetFacts:
    """One folder or metadata file of a dataset, under stock's keys."""

    img_count: int
    num_repeats: int
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    resize_interpolation: str | None = None
    image_dir: str | None = None  # paths are written without their folders
    metadata_file: str | None = None
    class_tokens: str | None = None
    is_reg: bool = False


@dataclass
class DatasetFacts:
    """One dataset, under stock's keys.

    Attributes:
        num_train_images, num_reg_images: with repeats.
        resolution: (width, height).
        tag_frequency: how often each tag was written, by folder or metadata file.
        bucket_counts: samples an epoch by (width, height).
        mean_img_ar_error: how far buckets are from their pictures' aspect ratios, on average.
    """

    batch_size_per_device: int
    num_train_images: int
    num_reg_images: int
    resolution: tuple[int, int]
    enable_bucket: bool
    bucket_no_upscale: bool
    min_bucket_reso: int | None
    max_bucket_reso: int | None
    tag_frequency: dict[str, dict[str, int]]
    bucket_counts: dict[tuple[int, int], int]
    mean_img_ar_error: float
    subsets: list[SubsetFacts]
    resize_interpolation: str | None = None


@dataclass
class RunFacts:
    """What a run knows beside its options."""

    started_at: float  # seconds since 1970
    session_id: int  # the same in all files of a run
    num_epochs: int
    num_batches_per_epoch: int
    total_batch_size: int  # of one step: batch size × processes × accumulation
    optimizer: str  # 'package.Class(key=value,…)'
    network_args: dict[str, Any] = field(default_factory=dict)
    num_validation_images: int = 0


def training_metadata(
    options: Options, kind: Kind, run: RunFacts, datasets: Sequence[DatasetFacts]
) -> dict[str, str]:
    """The `ss_*` keys that stay the same for all files of a run."""
    options = _in_stocks_form(options)
    values: dict[str, Any] = {
        f"ss_{name}": getattr(options, name) for name in _PLAIN_OPTIONS.split()
    }
    values |= {
        "ss_session_id": run.session_id,
        "ss_training_started_at": run.started_at,
        "ss_num_train_images": sum(dataset.num_train_images for dataset in datasets),
        "ss_num_validation_images": run.num_validation_images,
        "ss_num_reg_images": sum(dataset.num_reg_images for dataset in datasets),
        "ss_num_batches_per_epoch": run.num_batches_per_epoch,
        "ss_num_epochs": run.num_epochs,
        "ss_base_model_version": base_model_version(kind, options.v_parameterization),
        "ss_sd_scripts_commit_hash": commit_hash(),
        "ss_optimizer": run.optimizer,
        "ss_debiased_estimation": options.debiased_estimation_loss,
    }
    if options.network_args:
        values["ss_network_args"] = json.dumps(_network_args(options, run))
    if options.dataset_config:
        values |= _by_dataset(datasets)
    else:
        values |= _single_dataset(options, run, datasets[0])
    values |= _model_keys("sd_model", options.pretrained_model_name_or_path)
    values |= _model_keys("vae", options.vae)
    return {key: str(value) for key, value in values.items()}


def file_metadata(
    options: Options, kind: Kind, training: Mapping[str, str], steps: int, epoch: int
) -> dict[str, str]:
    """All keys of one file but its hashes: `training_metadata`'s, where it stands, ModelSpec's.

    Args:
        steps: done so far.
        epoch: the current one, from 1.
    """
    now = time.time()
    if options.no_metadata:
        kept = {key: training[key] for key in MINIMUM_KEYS if key in training}
    else:
        kept = {
            **training,
            "ss_training_finished_at": str(now),
            "ss_steps": str(steps),
            "ss_epoch": str(epoch),
        }
    return kept | model_spec(options, kind, now)


def file_hashes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which additional-networks tools know a file, whatever else its header says.

    `sshs_model_hash` is the SHA-256 of the tensors' bytes, `sshs_legacy_hash` that of 64 KiB at
    1 MiB into the file as it would be with the `ss_*` keys only.
    """
    file = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(file[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(file)[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8],
    }


def model_spec(options: Options, kind: Kind, now: float) -> dict[str, str]:
    """The `modelspec.*` keys, with what `--metadata_*` adds."""
    architecture = {
        "sdxl": "stable-diffusion-xl-v1-base",
        "sd2": f"stable-diffusion-v2-{'768-v' if options.v_parameterization else '512'}",
        "sd1": "stable-diffusion-v1",
    }[kind]
    sai = "https://github.com/Stability-AI/generative-models"
    values: dict[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/lora",
        "implementation": sai if kind == "sdxl" else "diffusers",
        "implementation_version": commit_hash(),
        "title": options.metadata_title or options.output_name or f"LoRA@{now}",
        "resolution": _resolution(options, kind),
        "date": datetime.datetime.fromtimestamp(int(now)).isoformat(),
        "prediction_type": "v" if options.v_parameterization else "epsilon",
        "encoder_layer": None if options.clip_skip is None else str(options.clip_skip),
    }
    if options.min_timestep is not None or options.max_timestep is not None:
        last = 1000 if options.max_timestep is None else options.max_timestep
        values["timestep_range"] = f"{options.min_timestep or 0},{last}"
    for name in _MODEL_SPEC_OPTIONS.split():
        values[name] = getattr(options, f"metadata_{name}")
    if options.metadata_thumbnail:
        values["thumbnail"] = _data_url(options.metadata_thumbnail)
    return {f"modelspec.{key}": value for key, value in values.items() if value is not None}


def base_model_version(kind: Kind, v_parameterization: bool) -> str:
    """`ss_base_model_version`: sd_v1, sd_v2, sd_v2_v or sdxl_base_v1-0."""
    if kind == "sdxl":
        return "sdxl_base_v1-0"
    return f"sd_{'v2' if kind == 'sd2' else 'v1'}{'_v' if v_parameterization else ''}"


@cache
def commit_hash() -> str:
    """The commit of this project's files, `(unknown)` outside of a clone."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=False)
    except OSError:  # no git on this machine
        return "(unknown)"
    return run.stdout.decode("ascii").strip() or "(unknown)"


def _in_stocks_form(options: Options) -> Options:
    """`options` with the values that stock's own preparations make of them."""
    changes: dict[str, Any] = {}
    if options.resolution is not None:
        changes["resolution"] = size(options.resolution)
    if options.face_crop_aug_range is not None:
        changes["face_crop_aug_range"] = factor_range(options.face_crop_aug_range)
    rates = options.text_encoder_lr or []
    if len(rates) < 2:  # of several stock has only the first; here all are in use
        changes["text_encoder_lr"] = rates[0] if rates else None
    if relative_step(options.optimizer_type, parse_optimizer_args(options.optimizer_args)):
        # Adafactor chooses its own: the rate that was given is where its schedule begins.
        if ":" not in options.lr_scheduler:
            changes["lr_scheduler"] = f"adafactor:{options.learning_rate}"
        changes |= dict.fromkeys(("learning_rate", "unet_lr", "text_encoder_lr"))
    return options.changed(changes)


def _network_args(options: Options, run: RunFacts) -> dict[str, Any]:
    """`--network_args`, and the dropout that stock puts among them."""
    arguments = dict(run.network_args)
    if not options.dim_from_weights:
        arguments.setdefault("dropout", options.network_dropout)
    return arguments


def _by_dataset(datasets: Sequence[DatasetFacts]) -> dict[str, str]:
    """The keys of a run with a dataset config: by dataset, and tags and folders of all."""
    tags: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        tags = dataset.tag_frequency | tags  # a folder in several datasets counts once
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    return {
        "ss_datasets": json.dumps([_dataset_entry(dataset) for dataset in datasets]),
        "ss_tag_frequency": json.dumps(tags),
        "ss_dataset_dirs": json.dumps(_folders(s for s in subsets if not s.is_reg)),
    }


def _single_dataset(options: Options, run: RunFacts, dataset: DatasetFacts) -> dict[str, Any]:
    """The keys of a run whose data came by `--train_data_dir` or `--in_json`."""
    subject = [subset for subset in dataset.subsets if not subset.is_reg]
    regularization = [subset for subset in dataset.subsets if subset.is_reg]
    return {
        **{f"ss_{name}": getattr(options, name) for name in _DATA_OPTIONS.split()},
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_total_batch_size": run.total_batch_size,
        "ss_enable_bucket": dataset.enable_bucket,
        "ss_bucket_no_upscale": dataset.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.min_bucket_reso,
        "ss_max_bucket_reso": dataset.max_bucket_reso,
        "ss_dataset_dirs": json.dumps(_folders(subject)),
        "ss_reg_dataset_dirs": json.dumps(_folders(regularization)),
        "ss_tag_frequency": json.dumps(dataset.tag_frequency),
        "ss_bucket_info": json.dumps(_bucket_info(dataset)),
    }


def _dataset_entry(dataset: DatasetFacts) -> dict[str, Any]:
    is_dreambooth = all(subset.metadata_file is None for subset in dataset.subsets)
    entry = {key: value for key, value in asdict(dataset).items() if key not in _OWN_KEYS}
    return entry | {
        "is_dreambooth": is_dreambooth,
        "bucket_info": _bucket_info(dataset),
        "subsets": [_subset_entry(subset, is_dreambooth) for subset in dataset.subsets],
    }


# Facts that stock writes in another form.
_OWN_KEYS = {"bucket_counts", "mean_img_ar_error", "bucket_no_upscale"}


def _subset_entry(subset: SubsetFacts, is_dreambooth: bool) -> dict[str, Any]:
    entry = asdict(subset)
    for key in ("image_dir", "metadata_file"):
        path = entry.pop(key)
        if path:
            entry[key] = Path(path).name
    if not is_dreambooth:
        del entry["class_tokens"], entry["is_reg"]
    return entry


def _bucket_info(dataset: DatasetFacts) -> dict[str, Any] | None:
    if not dataset.enable_bucket:
        return None
    buckets = {
        index: {"resolution": bucket, "count": count}
        for index, (bucket, count) in enumerate(dataset.bucket_counts.items())
    }
    return {"buckets": buckets, "mean_img_ar_error": dataset.mean_img_ar_error}


def _folders(subsets: Any) -> dict[str, dict[str, int]]:
    """`{"10_cat": {"n_repeats": 10, "img_count": 8}}`; the second of a name is `10_cat (2)`."""
    folders: dict[str, dict[str, int]] = {}
    for subset in subsets:
        name = base = Path(subset.metadata_file or subset.image_dir or "").name
        number = 2
        while name in folders:
            name, number = f"{base} ({number})", number + 1
        folders[name] = {"n_repeats": subset.num_repeats, "img_count": subset.img_count}
    return folders


def _model_keys(part: Literal["sd_model", "vae"], path: str | None) -> dict[str, str]:
    """Name and hashes of the base model or VAE; a hub id has a name only."""
    if path is None:
        return {}
    if not Path(path).exists():
        return {f"ss_{part}_name": path}
    old, new = _hashes_of_file(Path(path))
    name = Path(path).name
    return {f"ss_{part}_hash": old, f"ss_new_{part}_hash": new, f"ss_{part}_name": name}


@cache
def _hashes_of_file(path: Path) -> tuple[str, str]:
    """The web UI's old and new hash of a model file; stock's word for a folder."""
    if path.is_dir():
        return "IsADirectory", "IsADirectory"
    whole = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(0x100000)
        window = hashlib.sha256(file.read(0x10000))
        file.seek(0)
        while block := file.read(1 << 20):
            whole.update(block)
    return window.hexdigest()[:8], whole.hexdigest()


def _resolution(options: Options, kind: Kind) -> str:
    """`--resolution` as width x height, or what the kind of model is made for."""
    if options.resolution:
        width, height = size(options.resolution)
        return f"{width}x{height}"
    usual = {"sdxl": 1024, "sd2": 768 if options.v_parameterization else 512, "sd1": 512}[kind]
    return f"{usual}x{usual}"


def _data_url(picture: str) -> str:
    """A picture for the file's header: a data: URL as it is, a file as one."""
    if picture.startswith("data:"):
        return picture
    kind = mimetypes.guess_type(picture)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(picture).read_bytes()).decode('ascii')}"
