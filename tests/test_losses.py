"""Losses and weightings against their formulas, in float64, sample by sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from library.training.losses import diffusion_loss, huber_threshold
from library.training.noise import NoiseSchedule, PredictionType
from library.training.options import Options

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = torch.tensor([0, 1, 250, 700, 999])
WEIGHTS = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0])


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule(SD_BETAS)


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 6, 8, generator=stream), torch.randn(5, 4, 6, 8, generator=stream)


def alpha_bar(step: int) -> float:
    roots = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64)
    return float(torch.cumprod(1 - roots**2, dim=0)[step])


def snr(step: int) -> float:
    return alpha_bar(step) / (1 - alpha_bar(step))


def run(
    pair: tuple[Tensor, Tensor],
    schedule: NoiseSchedule,
    prediction_type: PredictionType = "epsilon",
    masks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    loss = diffusion_loss(
        *pair, STEPS, schedule, Options(**options), prediction_type, WEIGHTS, masks
    )
    assert loss.shape == (5,)
    return loss.double()


def per_sample(values: Tensor) -> Tensor:
    return values.mean(dim=(1, 2, 3)) * WEIGHTS.double()


def test_plain_losses(pair: tuple[Tensor, Tensor], schedule: NoiseSchedule) -> None:
    difference = pair[0].double() - pair[1].double()
    torch.testing.assert_close(run(pair, schedule), per_sample(difference**2))
    torch.testing.assert_close(run(pair, schedule, loss_type="l1"), per_sample(difference.abs()))


def reference_threshold(step: int, kind: str, c: float, scale: float) -> float:
    if kind == "constant":
        return c * scale
    if kind == "exponential":  # 1 at the first step, c where the last would end
        return c ** (step / 1000) * scale
    sigma = math.sqrt((1 - alpha_bar(step)) / alpha_bar(step))
    return (1 - c) / (1 + sigma) ** 2 + c


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
@pytest.mark.parametrize("kind", ["constant", "exponential", "snr"])
def test_pseudo_huber_losses(
    pair: tuple[Tensor, Tensor], schedule: NoiseSchedule, loss_type: str, kind: str
) -> None:
    loss = run(
        pair, schedule, loss_type=loss_type, huber_schedule=kind, huber_c=0.15, huber_scale=1.7
    )
    difference = pair[0].double() - pair[1].double()
    c = torch.tensor(
        [reference_threshold(int(step), kind, 0.15, 1.7) for step in STEPS], dtype=torch.float64
    ).reshape(-1, 1, 1, 1)
    elements = 2 * (torch.sqrt(difference**2 + c**2) - c)
    if loss_type == "huber":
        elements = elements * c
    torch.testing.assert_close(loss, per_sample(elements), rtol=2e-4, atol=1e-6)


def test_huber_is_quadratic_near_zero_and_linear_far_off(schedule: NoiseSchedule) -> None:
    target = torch.zeros(5, 1, 1, 1)
    near = run((torch.full_like(target, 1e-2), target), schedule, loss_type="huber", huber_c=1.0)
    torch.testing.assert_close(near / WEIGHTS, torch.full((5,), 1e-4).double(), rtol=1e-2, atol=0)
    far = run((torch.full_like(target, 1e4), target), schedule, loss_type="smooth_l1")
    torch.testing.assert_close(far / WEIGHTS, torch.full((5,), 2e4).double(), rtol=1e-3, atol=0)


def test_huber_threshold_survives_zero_terminal_snr() -> None:
    schedule = NoiseSchedule(SD_BETAS, zero_terminal_snr=True)
    threshold = huber_threshold(torch.tensor([999]), schedule, Options(huber_c=0.1))
    assert threshold.item() == pytest.approx(0.1)


def test_masks_are_area_averaged_to_the_latent_size(
    pair: tuple[Tensor, Tensor], schedule: NoiseSchedule
) -> None:
    masks = torch.rand(5, 1, 48, 64, generator=torch.Generator().manual_seed(3))
    cells = masks.double().reshape(5, 1, 6, 8, 8, 8).mean(dim=(3, 5))
    difference = pair[0].double() - pair[1].double()
    torch.testing.assert_close(run(pair, schedule, masks=masks), per_sample(difference**2 * cells))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr(
    pair: tuple[Tensor, Tensor], schedule: NoiseSchedule, prediction_type: PredictionType
) -> None:
    gained = run(pair, schedule, prediction_type, min_snr_gamma=5.0) / run(pair, schedule)
    for index, step in enumerate(STEPS.tolist()):
        below = snr(step) + 1 if prediction_type == "v_prediction" else snr(step)
        assert gained[index].item() == pytest.approx(min(snr(step), 5.0) / below, rel=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_debiased_estimation(
    pair: tuple[Tensor, Tensor], schedule: NoiseSchedule, prediction_type: PredictionType
) -> None:
    gained = run(pair, schedule, prediction_type, debiased_estimation_loss=True)
    gained = gained / run(pair, schedule)
    for index, step in enumerate(STEPS.tolist()):
        capped = min(snr(step), 1000.0)
        weight = 1 / (capped + 1) if prediction_type == "v_prediction" else capped**-0.5
        assert gained[index].item() == pytest.approx(weight, rel=1e-3)


def test_v_prediction_scalings(pair: tuple[Tensor, Tensor], schedule: NoiseSchedule) -> None:
    plain = run(pair, schedule, "v_prediction")
    scaled = run(pair, schedule, "v_prediction", scale_v_pred_loss_like_noise_pred=True) / plain
    added = run(pair, schedule, "epsilon", v_pred_like_loss=0.4) / plain
    for index, step in enumerate(STEPS.tolist()):
        scale = min(snr(step), 1000.0) / (min(snr(step), 1000.0) + 1)
        assert scaled[index].item() == pytest.approx(scale, rel=1e-3)
        assert added[index].item() == pytest.approx(1 + 0.4 / scale, rel=1e-3)


def test_weightings_combine_in_order(pair: tuple[Tensor, Tensor], schedule: NoiseSchedule) -> None:
    both = run(
        pair,
        schedule,
        "v_prediction",
        min_snr_gamma=1.0,
        scale_v_pred_loss_like_noise_pred=True,
        v_pred_like_loss=0.3,
        debiased_estimation_loss=True,
    )
    plain = run(pair, schedule)
    for index, step in enumerate(STEPS.tolist()):
        ratio, capped = snr(step), min(snr(step), 1000.0)
        scale = capped / (capped + 1)
        loss = float(plain[index]) * min(ratio, 1.0) / (ratio + 1) * scale
        loss = (loss + loss / scale * 0.3) / (capped + 1)
        assert both[index].item() == pytest.approx(loss, rel=1e-3)


def test_half_precision_predictions_are_compared_in_float32(schedule: NoiseSchedule) -> None:
    prediction = torch.full((5, 1, 1, 1), 300.0, dtype=torch.float16)  # its square overflows
    loss = run((prediction, torch.zeros(5, 1, 1, 1)), schedule)
    torch.testing.assert_close(loss / WEIGHTS, torch.full((5,), 90000.0).double())


def test_gradient_reaches_the_prediction(schedule: NoiseSchedule) -> None:
    prediction = torch.zeros(5, 4, 2, 2, requires_grad=True)
    target = torch.ones(5, 4, 2, 2)
    for kind in ("l2", "l1", "huber", "smooth_l1"):
        (gradient,) = torch.autograd.grad(
            run((prediction, target), schedule, loss_type=kind).sum(), prediction
        )
        assert (gradient < 0).all()
