"""Mistakes that the options alone show: missing, impossible and contradictory ones.

Each function returns a line for every problem it finds. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from library.training.options import OPTIONS, Options
from library.training.paths import exists, folder_problem, quote_problem
from library.training.refusals import REFUSED


def option_problems(options: Options, sdxl: bool) -> list[str]:
    """Everything that is wrong with `options` (settled) in themselves."""
    return [
        *refused_options(options),
        *_values(options),
        *_required(options),
        *_precision(options),
        *_caching(options),
        *_noise_and_loss(options, sdxl),
        *_adapter(options),
        *_steps(options),
        *_watching(options),
        *_paths(options),
    ]


def refused_options(options: Options) -> Iterator[str]:
    """A line for each reason why options cannot be used, where they differ from their default."""
    lines: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        value = getattr(options, name)
        if value != OPTIONS[name].default:
            secret = "token" in name
            lines.setdefault(reason, []).append(
                OPTIONS[name].flag if secret else OPTIONS[name].show(value)
            )
    for reason, shown in lines.items():
        yield f"{', '.join(shown)}: {reason}."


def _values(options: Options) -> Iterator[str]:
    for option in OPTIONS.values():
        value = getattr(options, option.name)
        problem = option.choice_problem(value) or option.range_problem(value)
        if problem:
            yield f"{problem}."
    for name in ("lr_warmup_steps", "lr_decay_steps"):
        value = getattr(options, name)
        if isinstance(value, float) and value > 1:
            yield f"--{name} {value:g}: a ratio is at most 1; a number of steps has no point."


def _required(options: Options) -> Iterator[str]:
    if options.network_module is None:
        yield "--network_module is missing: networks.lora, for instance, or networks.lokr."
    if options.output_dir is None:
        yield "--output_dir is missing: into which folder shall the adapter be written?"
    if options.output_config and not options.config_file:
        yield "--output_config needs --config_file, the name of the file to write."


def _precision(options: Options) -> Iterator[str]:
    if options.full_fp16 and options.full_bf16:
        yield "--full_fp16 and --full_bf16 exclude each other."
    for flag, precision in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if getattr(options, flag) and options.mixed_precision != precision:
            yield f"--{flag} needs --mixed_precision {precision}."


def _caching(options: Options) -> Iterator[str]:
    if options.cache_text_encoder_outputs and not options.network_train_unet_only:
        yield (
            "--cache_text_encoder_outputs needs --network_train_unet_only: an adapter of the text "
            "encoder changes what would be cached."
        )


def _noise_and_loss(options: Options, sdxl: bool) -> Iterator[str]:
    low, high = options.min_timestep or 0, options.max_timestep or 1000
    if low > high:
        yield f"--min_timestep {low} is above --max_timestep {high}: no timestep is left."
    if options.adaptive_noise_scale is not None and not options.noise_offset:
        yield "--adaptive_noise_scale needs --noise_offset, which it adds to."
    if options.scale_v_pred_loss_like_noise_pred and not options.v_parameterization:
        yield "--scale_v_pred_loss_like_noise_pred needs --v_parameterization."
    if options.v_pred_like_loss and options.v_parameterization:
        yield "--v_pred_like_loss and --v_parameterization exclude each other."
    if sdxl and options.v2:
        yield "--v2 is for Stable Diffusion 2.x; SDXL is trained without it."


def _adapter(options: Options) -> Iterator[str]:
    if options.network_train_unet_only and options.network_train_text_encoder_only:
        yield (
            "--network_train_unet_only and --network_train_text_encoder_only exclude each other: "
            "nothing would be trained."
        )
    if options.dim_from_weights and not options.network_weights:
        yield "--dim_from_weights needs --network_weights, the file to read the rank from."
    weights, strengths = options.base_weights or [], options.base_weights_multiplier or []
    if len(strengths) > len(weights):
        yield (
            f"--base_weights_multiplier has {len(strengths)} values for {len(weights)} "
            "--base_weights."
        )
    yield from optimizer_choice(options)


def optimizer_choice(options: Options) -> Iterator[str]:
    """Options that choose different optimizers."""
    chosen = [options.use_8bit_adam, options.use_lion_optimizer, bool(options.optimizer_type)]
    if sum(chosen) > 1:
        names = ("--use_8bit_adam", "--use_lion_optimizer", "--optimizer_type")
        shown = " and ".join(name for name, on in zip(names, chosen, strict=True) if on)
        yield f"{shown} choose different optimizers: keep one of them."


def _steps(options: Options) -> Iterator[str]:
    step, epoch, epochs = options.initial_step, options.initial_epoch, options.max_train_epochs
    if step and epochs is None and step >= options.max_train_steps:
        steps = options.max_train_steps
        yield f"--initial_step {step} leaves nothing of --max_train_steps {steps}."
    if epoch and step is None and epochs is not None and epoch > epochs:
        yield f"--initial_epoch {epoch} leaves nothing of --max_train_epochs {epochs}."
    if options.validation_split == 1:
        yield "--validation_split 1: no picture is left to train on."


def _watching(options: Options) -> Iterator[str]:
    asked = [
        OPTIONS[name].flag
        for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
        if getattr(options, name)
    ]
    if asked and not options.sample_prompts:
        yield f"{', '.join(asked)}: give the prompts to draw in a file, --sample_prompts."
    if options.output_name and {"/", "\\"} & set(options.output_name):
        yield (
            f"--output_name {options.output_name}: a name without folders, please; "
            "--output_dir says where."
        )


def _paths(options: Options) -> Iterator[str]:
    """Paths that nobody else looks at before the run, and folders that are written to."""
    for option in OPTIONS.values():
        value = getattr(options, option.name) if option.path else None
        for path in value if isinstance(value, list) else [value] if value else []:
            problem = quote_problem(option, path)
            if problem:
                yield problem
    for name in ("output_dir", "logging_dir"):
        folder = getattr(options, name)
        problem = folder_problem(OPTIONS[name].flag, folder) if folder else None
        if problem:
            yield problem
    thumbnail = options.metadata_thumbnail
    if thumbnail and not thumbnail.startswith("data:"):
        yield from exists(OPTIONS["metadata_thumbnail"], thumbnail, Path.is_file, "file")
