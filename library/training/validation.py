"""Validation loss: held-out pictures with the same noise and timesteps every time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from library.training.data import TrainingData
from library.training.objective import Objective
from library.training.options import Options
from library.training.processes import mean_over_processes

TIMESTEPS_PER_PICTURE = 4  # as many as stock's


@dataclass
class Validation:
    """The held-out pictures of a run and how much of them is used."""

    options: Options
    accelerator: Accelerator
    data: TrainingData

    @torch.no_grad()
    def loss(self, objective: Objective) -> float:
        """The mean over pictures and evenly spaced timesteps; it varies with the weights alone."""
        processes = self.accelerator.num_processes
        loader = self.data.loader(
            self.options,
            start=(0, 0),
            epochs=1,
            process_index=self.accelerator.process_index,
            num_processes=processes,
        )
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        limit = self.options.max_validation_steps
        for number, (_, _, batch) in enumerate(loader):
            if limit is not None and number >= limit:
                break
            for timestep in self._timesteps(objective):
                timesteps = torch.full((len(batch.captions),), timestep, dtype=torch.int64)
                total += objective(batch, timesteps).double().mean().cpu()
                count += 1
        mean = (total / max(count, 1)).float().to(self.accelerator.device)
        return mean_over_processes(mean, self.accelerator).item()

    def _timesteps(self, objective: Objective) -> list[int]:
        low = self.options.min_timestep or 0
        high = self.options.max_timestep or len(objective.schedule.alphas_cumprod)
        points = torch.linspace(low, high, TIMESTEPS_PER_PICTURE + 2)[1:-1]
        return [int(point) for point in points]
