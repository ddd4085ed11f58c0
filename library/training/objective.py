"""What training minimises: the denoising loss of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from library.training.data import Batch
from library.training.losses import diffusion_loss
from library.training.models import DiffusionModel
from library.training.noise import NoiseSchedule, add_noise, draw_noise, draw_timesteps, target
from library.training.options import Options
from library.training.text import TextEncoding


@dataclass
class Objective:
    """Maps a batch to one loss a sample. All randomness comes from the samples' own streams."""

    options: Options
    accelerator: Accelerator
    model: DiffusionModel
    schedule: NoiseSchedule
    text: TextEncoding

    def __call__(self, batch: Batch, timesteps: Tensor | None = None) -> Tensor:
        """Losses [B], float32; `timesteps` [B] are drawn where they are not given."""
        options, device = self.options, self.accelerator.device
        latents = self._latents(batch).to(device)
        noise = draw_noise(latents, batch.seeds, options)
        if timesteps is None:
            timesteps = draw_timesteps(batch.seeds, self.schedule, options)
        timesteps = timesteps.to(device)
        noisy = add_noise(self.schedule, latents, noise, timesteps, batch.seeds, options)
        with self.accelerator.autocast():
            embeddings = self.text(batch.captions)
            prediction = self.model.predict(noisy, timesteps, embeddings, batch)
        kind = self.model.prediction_type
        return diffusion_loss(
            prediction.float(),
            target(self.schedule, latents, noise, timesteps, kind),
            timesteps,
            self.schedule,
            options,
            kind,
            batch.loss_weights.to(device),
            None if batch.masks is None else batch.masks.to(device),
        )

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents
        if batch.images is None:
            raise ValueError("a batch holds latents or images")
        return self.model.encode_images(batch.images, batch.latent_seeds)
