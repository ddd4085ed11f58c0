"""The loss of each sample and the weightings that even it out over the timesteps.

`diffusion_loss` applies them in stock's order: element-wise loss, mask, mean, the sample's own
weight, then min-SNR, the two v-prediction scalings and debiased estimation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from library.training.noise import NoiseSchedule, PredictionType
from library.training.options import Options

# At timestep 0 the SNR is beyond all others; some weightings cap it.
SNR_CAP = 1000.0


def huber_threshold(timesteps: Tensor, schedule: NoiseSchedule, options: Options) -> Tensor:
    """Where the Huber losses turn from quadratic to linear, [B] (arXiv 2403.16728).

    constant: `huber_c`·`huber_scale`; exponential: from 1 at timestep 0 down to `huber_c` at the
    last, times `huber_scale`; snr: (1−c)/(1+σ)² + c with σ = √((1−α̅)/α̅), without the scale, as in
    stock.
    """
    if options.huber_schedule == "constant":
        return torch.full_like(
            timesteps, options.huber_c * options.huber_scale, dtype=torch.float32
        )
    if options.huber_schedule == "exponential":
        decay = -math.log(options.huber_c) / schedule.num_timesteps
        return torch.exp(-decay * timesteps) * options.huber_scale
    if options.huber_schedule == "snr":
        alphas_cumprod = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
        sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        return (1 - options.huber_c) / (1 + sigma) ** 2 + options.huber_c
    raise ValueError(f"unknown huber_schedule {options.huber_schedule!r}")


def elementwise_loss(
    prediction: Tensor, target: Tensor, kind: str, threshold: Tensor | None = None
) -> Tensor:
    """The loss of every element, in the shape of `prediction`, with d = prediction − target.

    l2: d², l1: |d|; with c the `threshold` [B]: huber: 2c(√(d²+c²)−c), smooth_l1: 2(√(d²+c²)−c).
    """
    difference = prediction - target
    if kind == "l2":
        return difference**2
    if kind == "l1":
        return difference.abs()
    if threshold is None:
        raise ValueError(f"loss_type {kind!r} needs a threshold")
    c = threshold.reshape(-1, *(1,) * (prediction.ndim - 1))
    smooth_l1 = 2 * (torch.sqrt(difference**2 + c**2) - c)
    if kind == "smooth_l1":
        return smooth_l1
    if kind == "huber":
        return c * smooth_l1
    raise ValueError(f"unknown loss_type {kind!r}")


def timestep_weighting(
    loss: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    options: Options,
    prediction_type: PredictionType,
) -> Tensor:
    """Reweight the losses [B] by the signal-to-noise ratios of their timesteps."""
    snr = schedule.snr(timesteps).to(loss.device)
    capped = snr.clamp(max=SNR_CAP)
    predicts_v = prediction_type == "v_prediction"
    if options.min_snr_gamma:  # arXiv 2303.09556
        loss = loss * snr.clamp(max=options.min_snr_gamma) / (snr + 1 if predicts_v else snr)
    v_to_noise = capped / (capped + 1)
    if options.scale_v_pred_loss_like_noise_pred:
        loss = loss * v_to_noise
    if options.v_pred_like_loss:
        loss = loss + loss / v_to_noise * options.v_pred_like_loss
    if options.debiased_estimation_loss:  # arXiv 2310.08442
        loss = loss / (capped + 1 if predicts_v else capped.sqrt())
    return loss


def diffusion_loss(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    options: Options,
    prediction_type: PredictionType,
    loss_weights: Tensor,
    masks: Tensor | None,
) -> Tensor:
    """The loss of each sample, [B] float32.

    `prediction` and `target` are [B, C, H, W]; `loss_weights` is [B]; `masks`, if any, is
    [B, 1, h, w] in [0, 1] at any resolution: where it is 0 the prediction doesn't matter.
    """
    threshold = None
    if options.loss_type in ("huber", "smooth_l1"):
        threshold = huber_threshold(timesteps, schedule, options).to(prediction.device)
    elements = elementwise_loss(prediction.float(), target.float(), options.loss_type, threshold)
    if masks is not None:
        masks = masks.to(elements.device, elements.dtype)
        elements = elements * F.interpolate(masks, size=elements.shape[2:], mode="area")
    loss = elements.mean(dim=tuple(range(1, elements.ndim))) * loss_weights.to(elements.device)
    return timestep_weighting(loss, timesteps, schedule, options, prediction_type)
