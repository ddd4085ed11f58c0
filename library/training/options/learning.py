"""Options about what is learned at a step: optimizer, learning rate, noise and loss."""

# ruff: noqa: RUF009 (`option` makes a field, as `dataclasses.field` does)
from __future__ import annotations

from dataclasses import dataclass

from library.training.options.fields import int_or_float, option


@dataclass
class OptimizerOptions:
    """Optimizer."""

    optimizer_type: str = option(
        "",
        "HinaAdamW, AdamW, AdamW8bit, Lion, Prodigy, … or package.module.Class; AdamW without it",
    )
    optimizer_args: list[str] | None = option(
        None, "arguments of the optimizer, as key=value (weight_decay=0.01 betas=0.9,0.99 …)"
    )
    use_8bit_adam: bool = option(False, "the same as --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "the same as --optimizer_type Lion")
    learning_rate: float = option(2e-6, "learning rate where no other is given", low=0)
    unet_lr: float | None = option(None, "learning rate of the UNet's adapter", low=0)
    text_encoder_lr: list[float] | None = option(
        None, "learning rate of the text encoder's adapter, one for all or one for each", low=0
    )
    max_grad_norm: float = option(1.0, "longer gradients are cut to this norm; 0 for never", low=0)
    fused_backward_pass: bool = option(False, "step inside the backward pass to save memory")


@dataclass
class ScheduleOptions:
    """Learning-rate schedule."""

    lr_scheduler: str = option(
        "constant",
        "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, "
        "inverse_sqrt, cosine_with_min_lr, warmup_stable_decay, piecewise_constant or adafactor:LR",
    )
    lr_scheduler_type: str = option(
        "", "a scheduler class instead: a name of torch.optim.lr_scheduler or package.module.Class"
    )
    lr_scheduler_args: list[str] | None = option(
        None, "arguments of the scheduler, as key=value (T_max=100 …)"
    )
    lr_warmup_steps: float = option(
        0,
        "the rate rises for so many steps, or for this share of all (0.05, 5%)",
        parse=int_or_float,
        low=0,
    )
    lr_decay_steps: float = option(
        0,
        "the rate falls for so many last steps, or for this share of all (warmup_stable_decay)",
        parse=int_or_float,
        low=0,
    )
    lr_scheduler_num_cycles: int = option(1, "periods of the cosine schedules", low=1)
    lr_scheduler_power: float = option(1, "exponent of the polynomial schedule", low=0)
    lr_scheduler_timescale: int | None = option(
        None, "steps after which inverse_sqrt begins to fall; its warm-up without this", low=1
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "lowest rate as a share of the highest (cosine_with_min_lr, warmup_stable_decay)",
        low=0,
        high=1,
    )


@dataclass
class NoiseOptions:
    """Noise and timesteps."""

    min_timestep: int | None = option(
        None, "lowest timestep to train on; 0 without it", low=0, high=999
    )
    max_timestep: int | None = option(
        None, "timesteps below this one are trained on; 1000 without it", low=1, high=1000
    )
    noise_offset: float | None = option(
        None, "shift the noise of each channel at random by this much (try 0.05 to 0.1)", low=0
    )
    noise_offset_random_strength: bool = option(
        False, "draw the strength between 0 and --noise_offset each time"
    )
    adaptive_noise_scale: float | None = option(
        None, "add the latents' absolute mean times this to --noise_offset"
    )
    multires_noise_iterations: int | None = option(
        None, "add noise at so many coarser resolutions (try 6 to 10)", low=0
    )
    multires_noise_discount: float = option(
        0.3, "strength of each coarser noise relative to the one before it", low=0
    )
    ip_noise_gamma: float | None = option(
        None, "disturb the noisy input by further noise of this strength (try 0.1)", low=0
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "draw the strength between 0 and --ip_noise_gamma each time"
    )
    zero_terminal_snr: bool = option(
        False, "rescale the noise schedule so that the last timestep is pure noise (v models)"
    )


@dataclass
class LossOptions:
    """Loss."""

    loss_type: str = option(
        "l2",
        "distance between prediction and target",
        choices=("l1", "l2", "huber", "smooth_l1"),
        explain={
            "fourier": "the Fourier feature loss compares images; this training runs on latents, "
            "whose frequencies are not the picture's. Choose one of l1, l2, huber, smooth_l1"
        },
    )
    huber_schedule: str = option(
        "snr",
        "how the huber and smooth_l1 threshold changes over the timesteps",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option(0.1, "threshold at the noisiest timestep", above=0)
    huber_scale: float = option(1.0, "factor on the threshold", above=0)
    min_snr_gamma: float | None = option(
        None,
        "limit the weight of timesteps with little noise (Min-SNR; 5 is usual, 0 is off)",
        low=0,
    )
    debiased_estimation_loss: bool = option(
        False, "weigh timesteps by 1/sqrt(SNR) (debiased estimation)"
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "weigh the loss of a v model as that of a noise model"
    )
    v_pred_like_loss: float | None = option(
        None, "add this times the loss as a v model would weigh it", low=0
    )
