"""A run's facts for its files' metadata: from the data, the loop and the clock to `ss_*` keys."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass, field, fields

import torch

from library.training.data import TrainingData
from library.training.metadata import (
    DatasetFacts,
    Kind,
    RunFacts,
    SubsetFacts,
    file_hashes,
    file_metadata,
    training_metadata,
)
from library.training.options import Options
from library.training.records import PictureSet


@dataclass
class Provenance:
    """Writes the metadata of every file of one run."""

    options: Options
    kind: Kind
    data: TrainingData
    validation_data: TrainingData | None
    network_args: dict[str, str]
    optimizer: str
    num_epochs: int
    num_processes: int
    # Not from the run's seeded generators: two runs with one seed are still two sessions.
    session_id: int = field(default_factory=lambda: random.SystemRandom().getrandbits(32))
    started_at: float = field(default_factory=time.time)

    def metadata(self, tensors: dict[str, torch.Tensor], steps: int, epoch: int) -> dict[str, str]:
        """The metadata of a file that holds `tensors`, after `steps` steps in epoch `epoch`."""
        training = training_metadata(
            self.options, self.kind, self._run(), [_dataset(each) for each in self.data.sets]
        )
        values = file_metadata(self.options, self.kind, training, steps, epoch)
        return values | file_hashes(tensors, values)

    def _run(self) -> RunFacts:
        per_step = self.num_processes * self.options.gradient_accumulation_steps
        validation = self.validation_data
        return RunFacts(
            started_at=self.started_at,
            session_id=self.session_id,
            num_epochs=self.num_epochs,
            num_batches_per_epoch=self.data.steps_per_epoch(self.num_processes),
            total_batch_size=self.options.train_batch_size * per_step,
            optimizer=self.optimizer,
            network_args=dict(self.network_args),
            num_validation_images=len(validation.records) if validation is not None else 0,
        )


def _dataset(pictures: PictureSet) -> DatasetFacts:
    spec = pictures.spec
    buckets = spec.enable_bucket
    return DatasetFacts(
        batch_size_per_device=spec.batch_size,
        num_train_images=pictures.num_train_images,
        num_reg_images=pictures.regularization_found,
        resolution=spec.resolution,
        enable_bucket=buckets,
        bucket_no_upscale=buckets and spec.bucket_no_upscale,
        min_bucket_reso=spec.min_bucket_reso if buckets else None,
        max_bucket_reso=spec.max_bucket_reso if buckets else None,
        tag_frequency=pictures.tag_frequency(),
        bucket_counts=pictures.bucket_counts(),
        mean_img_ar_error=pictures.mean_aspect_error(),
        subsets=_subsets(pictures),
    )


def _subsets(pictures: PictureSet) -> list[SubsetFacts]:
    names = {each.name for each in fields(SubsetFacts)}
    return [
        SubsetFacts(
            img_count=pictures.pictures_of(subset),
            **{name: value for name, value in asdict(subset).items() if name in names},
        )
        for subset in pictures.spec.subsets
    ]
