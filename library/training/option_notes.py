"""What the log should say about the options of a run that is allowed to start."""

from __future__ import annotations

from collections.abc import Iterator

from library.training.options import OPTIONS, Options

# Options about what is done here in one way only.
_IDLE = {
    "lowram": "models are read in the precision they are used in, not in a wider one",
    "highvram": "GPU memory is not cleared between the steps of a stage in any case",
    "tokenizer_cache_dir": "tokenizers come with the model or with this program",
    "cache_text_encoder_outputs_to_disk": (
        "encoded captions are kept in memory; encoding them again takes seconds"
    ),
}


def option_notes(options: Options, sdxl: bool) -> list[str]:
    """A line for every option that acts otherwise than one might expect, or not at all."""
    return [*_unusual(options, sdxl), *_overruled(options), *_without_effect(options)]


def _unusual(options: Options, sdxl: bool) -> Iterator[str]:
    attention = [f"--{name}" for name in ("xformers", "mem_eff_attn") if getattr(options, name)]
    if attention:
        yield (
            f"{', '.join(attention)}: attention goes through PyTorch's "
            "scaled_dot_product_attention, which picks the fastest kernel of this machine."
        )
    for name, reason in _IDLE.items():
        if getattr(options, name):
            yield f"--{name} changes nothing: {reason}."
    ddp = [
        f"--{name}"
        for name in ("ddp_gradient_as_bucket_view", "ddp_static_graph")
        if getattr(options, name)
    ]
    if ddp:
        yield (
            f"{', '.join(ddp)}: processes exchange an adapter's gradients in one piece and "
            "without DDP's copies, so there is nothing to save."
        )
    if options.v2 and options.clip_skip is not None:
        yield "--clip_skip with --v2: SD 2.x was trained on the last layer but one by itself."
    if sdxl and options.clip_skip is not None:
        yield "--clip_skip has no effect on SDXL, which always takes the last layer but one."
    if options.zero_terminal_snr and not options.v_parameterization:
        yield (
            "--zero_terminal_snr without --v_parameterization: at the last timestep the input is "
            "pure noise, from which a noise model learns nothing."
        )
    if options.noise_offset and options.multires_noise_iterations:
        yield "--noise_offset and --multires_noise_iterations both act; one alone is usual."
    steps = options.max_train_steps
    if options.max_train_epochs is None and options.lr_warmup_steps > steps:
        yield (
            f"--lr_warmup_steps {options.lr_warmup_steps} is longer than the run of {steps} steps: "
            "the learning rate never reaches its full value."
        )
    rates = [options.learning_rate, options.unet_lr or 0, *(options.text_encoder_lr or [])]
    if not any(rates):
        yield "--learning_rate 0: nothing will be learned."


def _overruled(options: Options) -> Iterator[str]:
    """Pairs of which one wins, where the user set both."""
    pairs = (
        ("max_train_epochs", "max_train_steps"),
        ("sample_every_n_epochs", "sample_every_n_steps"),
        ("save_n_epoch_ratio", "save_every_n_epochs"),
        ("initial_step", "initial_epoch"),
        ("lr_scheduler_type", "lr_scheduler"),
    )
    for winner, loser in pairs:
        if {winner, loser} <= options.given and getattr(options, winner) not in (None, "", 0):
            yield f"--{winner} is set, so --{loser} is not used."


def _without_effect(options: Options) -> Iterator[str]:
    """Options that only act together with another, which is not set."""
    huber = options.loss_type in ("huber", "smooth_l1")
    config = options.dataset_config is not None  # it may hold what the command line lacks
    by_epoch = options.save_every_n_epochs or options.save_n_epoch_ratio
    by_step = options.save_every_n_steps
    validates = options.validation_split > 0 or config
    starts_later = options.initial_epoch or options.initial_step or options.resume
    conditions = {
        "--loss_type huber or smooth_l1": (huber, ("huber_schedule", "huber_c", "huber_scale")),
        "--noise_offset": (options.noise_offset, ("noise_offset_random_strength",)),
        "--ip_noise_gamma": (options.ip_noise_gamma, ("ip_noise_gamma_random_strength",)),
        "--multires_noise_iterations": (
            options.multires_noise_iterations,
            ("multires_noise_discount",),
        ),
        "--enable_bucket": (
            options.enable_bucket or config,
            ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"),
        ),
        "--cache_latents": (options.cache_latents, ("vae_batch_size", "skip_cache_check")),
        "--save_every_n_epochs": (by_epoch, ("save_last_n_epochs",)),
        "--save_every_n_steps": (by_step, ("save_last_n_steps",)),
        "--save_state and --save_every_n_epochs": (
            options.save_state and by_epoch,
            ("save_last_n_epochs_state",),
        ),
        "--save_state and --save_every_n_steps": (
            options.save_state and by_step,
            ("save_last_n_steps_state",),
        ),
        "--validation_split": (
            validates,
            (
                "validation_seed",
                "validate_every_n_steps",
                "validate_every_n_epochs",
                "max_validation_steps",
            ),
        ),
        "--initial_epoch, --initial_step or --resume": (starts_later, ("skip_until_initial_step",)),
        "metadata (--no_metadata is set)": (not options.no_metadata, ("training_comment",)),
    }
    for needed, (met, names) in conditions.items():
        idle = [
            OPTIONS[name].flag
            for name in names
            if name in options.given and getattr(options, name) != OPTIONS[name].default
        ]
        if idle and not met:
            yield f"{', '.join(idle)} {'acts' if len(idle) == 1 else 'act'} only with {needed}."
