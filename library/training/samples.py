"""From a place in the run, (epoch, index), to the batch that is trained on there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from library.training.captions import vary_caption
from library.training.epochs import Group, Sample, batch_count, plan_epoch, share
from library.training.errors import UserError
from library.training.images import centre_crop, prepare
from library.training.latents import LatentStore, latent_seed
from library.training.options import Options
from library.training.randomness import derive_seed, python_stream
from library.training.records import PictureSet, Record


@dataclass
class Batch:
    """One process's samples of a step. Sizes are (height, width), offsets (top, left)."""

    captions: list[str]
    seeds: list[int]  # one random stream a sample: for noise, timestep, …
    loss_weights: Tensor  # [B] float32: prior_loss_weight for regularization pictures
    paths: list[str]
    latents: Tensor | None  # [B, C, h, w] float32, scaled; cached …
    images: Tensor | None  # … or [B, 3, H, W] float32 in [-1, 1]
    latent_seeds: list[int]  # of the VAE's draws, where there are images
    masks: Tensor | None  # [B, 1, H, W] float32 in [0, 1], where the loss is masked
    original_sizes: Tensor  # [B, 2] int64
    crop_top_lefts: Tensor  # [B, 2] int64, in the scaled picture
    target_sizes: Tensor  # [B, 2] int64


@dataclass
class _Item:
    """One sample, before it is stacked with others."""

    caption: str
    seed: int
    weight: float
    path: str
    latents: Tensor | None
    image: Tensor | None
    latent_seed: int
    mask: Tensor | None
    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


class Samples(Dataset[Any]):
    """Batches by (epoch, index). It pickles, so that loader workers can have it."""

    def __init__(
        self,
        sets: list[PictureSet],
        groups: list[Group],
        store: LatentStore | None,
        validates: bool,
        options: Options,
        process_index: int,
        num_processes: int,
    ) -> None:
        self.sets, self.groups, self.store, self.validates = sets, groups, store, validates
        self.process_index = process_index
        self.num_processes = num_processes
        self.seed = seed_of(options)
        if validates and options.validation_seed is not None:
            self.seed = options.validation_seed
        accumulation = options.gradient_accumulation_steps
        self.accumulation = accumulation
        self.updates_per_epoch = math.ceil(batch_count(groups, num_processes) / accumulation)
        self.max_steps = options.max_train_steps
        if options.max_train_epochs is not None:
            self.max_steps = options.max_train_epochs * self.updates_per_epoch
        self._plan: tuple[int, list[list[Sample]]] | None = None

    def __getitem__(self, at: tuple[int, int]) -> tuple[int, int, Batch] | UserError:
        try:
            return *at, self.batch(*at)
        except UserError as error:
            return error  # raised by the loader: from a worker it would come with a traceback

    def batch(self, epoch: int, index: int) -> Batch:
        """This process's part of batch `index`."""
        chosen = share(self._batches(epoch)[index], self.process_index, self.num_processes)
        step = epoch * self.updates_per_epoch + index // self.accumulation
        return _stack([self._item(sample, epoch, step) for sample in chosen])

    def _batches(self, epoch: int) -> list[list[Sample]]:
        if self._plan is None or self._plan[0] != epoch:
            shuffle = not self.validates
            plan = plan_epoch(self.groups, self.seed, epoch, self.num_processes, shuffle)
            self._plan = (epoch, plan)
        return self._plan[1]

    def _item(self, sample: Sample, epoch: int, step: int) -> _Item:
        pictures = self.sets[sample.dataset]
        record = pictures.records[sample.record]
        subset = record.subset
        if self.validates:
            seed = derive_seed(self.seed, "validation", record.key)
        else:
            seed = derive_seed(self.seed, "sample", epoch, record.key, sample.repeat)
        words = python_stream(seed, "caption")
        flipped = subset.flip_aug and python_stream(seed, "flip").random() < 0.5
        width, height = record.placement.bucket
        item = _Item(
            caption=vary_caption(record.caption, subset, words, epoch, step, self.max_steps),
            seed=seed,
            weight=pictures.spec.prior_loss_weight if subset.is_reg else 1.0,
            path=record.path,
            latents=None,
            image=None,
            latent_seed=0,
            mask=None,
            original=(record.size[1], record.size[0]),
            crop=_cached_crop(record, flipped),
            target=(height, width),
        )
        if self.store is not None:
            item.latents, item.mask = self.store.read(record, flipped)
            return item
        picture = prepare(record.path, record.mask_path, subset, record.placement, seed, flipped)
        item.image, item.mask, item.crop = picture.pixels, picture.mask, picture.crop
        item.latent_seed = latent_seed(picture.content)
        return item


def _cached_crop(record: Record, flipped: bool) -> tuple[int, int]:
    top, left = centre_crop(record.placement)
    if flipped:
        left = record.placement.resized[0] - record.placement.bucket[0] - left
    return top, left


def _stack(items: list[_Item]) -> Batch:
    latents = [item.latents for item in items if item.latents is not None]
    images = [item.image for item in items if item.image is not None]
    masks = None
    if any(item.mask is not None for item in items):
        whole = torch.ones(1, *items[0].target)
        masks = torch.stack([whole if item.mask is None else item.mask for item in items])
    return Batch(
        captions=[item.caption for item in items],
        seeds=[item.seed for item in items],
        loss_weights=torch.tensor([item.weight for item in items], dtype=torch.float32),
        paths=[item.path for item in items],
        latents=torch.stack(latents) if latents else None,
        images=torch.stack(images) if images else None,
        latent_seeds=[item.latent_seed for item in items],
        masks=masks,
        original_sizes=torch.tensor([item.original for item in items]),
        crop_top_lefts=torch.tensor([item.crop for item in items]),
        target_sizes=torch.tensor([item.target for item in items]),
    )


def seed_of(options: Options) -> int:
    """The run's seed, which the trainer has filled in."""
    if options.seed is None:
        raise ValueError("the run's seed is to be chosen before its data is opened")
    return options.seed
