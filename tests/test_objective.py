"""The loss of a batch, from its latents or from its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from picture_folders import options_for, write_folder

from library.training.data import Batch, TrainingData
from library.training.models import load_model
from library.training.noise import NoiseSchedule
from library.training.objective import Objective
from library.training.options import Options
from library.training.text import TextEncoding


def first_batch(data: TrainingData, options: Options) -> Batch:
    batch: Batch = next(iter(data.loader(options, (0, 0), 1, 0, 1)))[2]
    return batch


@torch.no_grad()
def test_the_loss_is_the_same_with_and_without_a_latent_cache(
    tiny_sd1: Path, tmp_path: Path
) -> None:
    write_folder(tmp_path / "1_cat", 4)
    options = options_for(
        tmp_path,
        pretrained_model_name_or_path=str(tiny_sd1),
        train_batch_size=4,
        flip_aug=True,
        max_data_loader_n_workers=0,
    )
    model = load_model(options, False, torch.float32, "cpu")
    objective = Objective(
        options,
        Accelerator(cpu=True),
        model,
        NoiseSchedule(model.scheduler_config),
        TextEncoding(model, options, trains_text_encoder=False),
    )
    data, _ = TrainingData.open(options)
    pictures = first_batch(data, options)
    data.cache_latents(model, options.changed({"cache_latents": True}))
    latents = first_batch(data, options)
    assert pictures.images is not None
    assert latents.images is None
    uncached, cached = objective(pictures), objective(latents)
    assert uncached.tolist() == pytest.approx(cached.tolist(), rel=1e-5)
    assert len(set(cached.tolist())) == 4
