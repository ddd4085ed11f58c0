"""Validation loss: held-out pictures with the same noise and timesteps every time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from library.training.data import TrainingData
from library.training.epochs import plan_epoch, share
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
        """The mean over pictures and evenly spaced timesteps; it varies with the weights alone.

        Each picture counts once, whatever the size of its batch. Several processes give the mean
        of one with as many times the batch size.
        """
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        loader = self.data.loader(
            self.options, start=(0, 0), epochs=1, process_index=process, num_processes=processes
        )
        plan = plan_epoch(self.data.groups, 0, 0, processes, shuffle=False)  # as the loader's
        timesteps = self._timesteps(objective)
        total, count = 0.0, 0
        for number, (_, index, batch) in enumerate(loader):
            if number == self.options.max_validation_steps:
                break
            # What fills up a batch that the processes cannot share evenly was there before.
            own = [sample.repeat >= 0 for sample in share(plan[index], process, processes)]
            for timestep in timesteps:
                at = torch.full((len(own),), timestep, dtype=torch.int64)
                losses = objective(batch, at).cpu().double()  # not all devices have float64
                total += losses[torch.tensor(own)].sum().item()
            count += sum(own) * len(timesteps)
        sums = torch.tensor([total, count], dtype=torch.float32, device=self.accelerator.device)
        total, count = mean_over_processes(sums, self.accelerator).tolist()
        return total / count

    def _timesteps(self, objective: Objective) -> list[int]:
        low = self.options.min_timestep or 0
        high = self.options.max_timestep or len(objective.schedule.alphas_cumprod)
        points = torch.linspace(low, high, TIMESTEPS_PER_PICTURE + 2)[1:-1]
        return [int(point) for point in points]
