"""The training data: pictures found and checked, latents cached, batches in a fixed order."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from library.training.dataset_config import DatasetSpec, SubsetSpec, read_datasets
from library.training.epochs import Group, Sample, batch_count
from library.training.errors import UserError
from library.training.latents import Encoder, LatentStore, Progress, fill_cache
from library.training.options import Options
from library.training.records import PictureSet, Record, gather
from library.training.samples import Batch, Samples, seed_of
from library.training.sources import Findings

__all__ = ["Batch", "TrainingData"]


class TrainingData:
    """The pictures that a run trains on, or those that it validates on."""

    def __init__(
        self, sets: list[PictureSet], notes: Sequence[str] = (), validates: bool = False
    ) -> None:
        self.sets = sets
        self.notes = list(notes)
        self.validates = validates
        self.store: LatentStore | None = None
        self.groups = [group for number, each in enumerate(sets) for group in _groups(number, each)]

    @classmethod
    def open(cls, options: Options) -> tuple[TrainingData, TrainingData | None]:
        """Find and check all pictures: (for training, for validation).

        UserError lists every mistake in the dataset's description, or else every picture that is
        missing or broken; with `skip_broken_images` those are left out and counted. A folder
        without pictures is a note where others have some.
        """
        specs = read_datasets(options)
        findings = Findings(_cache_problems(specs, options))
        pairs = [
            gather(spec, number, seed_of(options), findings) for number, spec in enumerate(specs)
        ]
        training, held_out = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        trains = any(each.records for each in training)
        # An empty folder is left out, as in sd-scripts, unless that leaves nothing.
        (findings.notes if trains else findings.problems).extend(findings.empty)
        _report_findings(findings, options.skip_broken_images)
        if not trains:
            raise UserError("no pictures are left to train on")
        notes = [note for spec in specs for note in spec.notes] + findings.notes
        if any(each.records for each in held_out):
            return cls(training, notes), cls(held_out, validates=True)
        if any(subset.validation_split for spec in specs for subset in spec.subsets):
            notes.append("validation_split holds no picture out: there are too few pictures")
        return cls(training, notes), None

    @property
    def records(self) -> list[Record]:
        """All pictures, of all datasets."""
        return [record for each in self.sets for record in each.records]

    def cache_latents(
        self,
        model: Encoder,
        options: Options,
        progress: Progress | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Encode the pictures if the options say so; in files, wait for all processes after it."""
        self.check_latent_grid(model.vae_factor)
        if not (options.cache_latents or options.cache_latents_to_disk):
            return
        self.store = fill_cache(
            self.records,
            model,
            to_disk=options.cache_latents_to_disk,
            batch_size=options.vae_batch_size,
            trust_files=options.skip_cache_check,
            progress=progress,
            process_index=process_index,
            num_processes=num_processes,
        )

    def check_latent_grid(self, vae_factor: int) -> None:
        """UserError if a size is no multiple of the pixels that make one latent cell."""
        sizes = {size for each in self.sets for size in each.bucket_counts()}
        uneven = sorted(size for size in sizes if size[0] % vae_factor or size[1] % vae_factor)
        if uneven:
            raise UserError(
                f"pictures would be trained at {', '.join(f'{w}×{h}' for w, h in uneven)}, but the "
                f"VAE makes one latent of {vae_factor}×{vae_factor} pixels: choose a resolution "
                f"and bucket_reso_steps that are multiples of {vae_factor}"
            )

    def steps_per_epoch(self, num_processes: int) -> int:
        """Batches an epoch, for each process."""
        return batch_count(self.groups, num_processes)

    def loader(
        self,
        options: Options,
        start: tuple[int, int],
        epochs: int,
        process_index: int,
        num_processes: int,
    ) -> DataLoader[Any]:
        """One loader for the whole run: (epoch, index, Batch) from `start` on, to `epochs`.

        Validation data comes in the same order, with the same captions and seeds, every epoch.
        """
        steps = self.steps_per_epoch(num_processes)
        samples = self._samples(options, process_index, num_processes)
        # Latents in memory are only stacked: a worker would cost more than it does. Otherwise the
        # workers live as long as the loader's one pass, which is the whole run, whether or not
        # persistent_data_loader_workers is set.
        in_memory = self.store is not None and bool(self.store.in_memory)
        workers = 0 if in_memory else min(options.max_data_loader_n_workers, os.cpu_count() or 1)
        return _RunLoader(
            samples,
            sampler=_RunSampler(start, epochs, steps),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=_leave_signals_to_the_main_process,
            # Without a generator of its own, the loader draws from torch's and changes its state.
            generator=torch.Generator().manual_seed(0),
        )

    def _samples(self, options: Options, process_index: int, num_processes: int) -> Samples:
        return Samples(
            self.sets,
            self.groups,
            self.store,
            self.validates,
            options,
            process_index,
            num_processes,
        )

    def describe(self) -> list[str]:
        """What there is to train on, a line each for datasets, folders and sizes."""
        lines = []
        for number, each in enumerate(self.sets):
            lines += _describe(number, each, self.validates)
        samples = sum(len(group.samples) for group in self.groups)
        kind = "validation samples" if self.validates else "samples an epoch"
        lines.append(f"{len(self.records)} pictures, {samples} {kind}")
        return lines + [f"note: {note}" for note in self.notes]

    def debug_lines(self, options: Options, epoch: int = 0) -> Iterator[str]:
        """What each sample of an epoch would be (`debug_dataset`)."""
        samples = self._samples(options, 0, 1)
        for index in range(self.steps_per_epoch(1)):
            batch = samples.batch(epoch, index)
            for place, path in enumerate(batch.paths):
                original, crop, target = (
                    tuple(sizes[place].tolist())
                    for sizes in (batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
                )
                yield (
                    f"batch {index} {path}: caption {batch.captions[place]!r}, loss weight "
                    f"{batch.loss_weights[place]:g}, (height, width) {original} cut at {crop} "
                    f"to {target}, {'masked' if batch.masks is not None else 'no mask'}"
                )


def _groups(number: int, pictures: PictureSet) -> list[Group]:
    """The samples of a dataset by size, smallest first."""
    by_size: dict[tuple[int, int], list[Sample]] = {}
    for index, record in enumerate(pictures.records):
        by_size.setdefault(record.placement.bucket, []).extend(
            Sample(number, index, repeat) for repeat in range(record.repeats)
        )
    return [Group(pictures.spec.batch_size, by_size[size]) for size in sorted(by_size)]


class _RunSampler(Sampler[tuple[int, int]]):
    """(epoch, index) of every batch from `start` on: persistent workers thus follow the epochs."""

    def __init__(self, start: tuple[int, int], epochs: int, steps: int) -> None:
        self.start, self.epochs, self.steps = start, epochs, steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, index = self.start
        while epoch < self.epochs:
            yield from ((epoch, each) for each in range(index, self.steps))
            epoch, index = epoch + 1, 0

    def __len__(self) -> int:
        epoch, index = self.start
        return max(0, (self.epochs - epoch) * self.steps - index)


class _RunLoader(DataLoader[Any]):
    """A loader that raises the errors which its workers hand over."""

    def __iter__(self) -> Any:
        for item in super().__iter__():
            if isinstance(item, UserError):
                raise item
            yield item


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, but the main one alone ends a run in order.

    SIGTERM still ends a worker, for so the main process ends one that hangs; it is not to come
    with one that `timeout` sends to the whole group.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # Windows has no groups of this kind
        os.setpgrp()


def _cache_problems(specs: list[DatasetSpec], options: Options) -> list[str]:
    """Augmentations that cached latents leave no room for."""
    if not (options.cache_latents or options.cache_latents_to_disk):
        return []
    return [
        f"{subset.source}: latents cannot be cached with color_aug, random_crop or "
        "face_crop_aug_range, which change the picture each time: turn one or the other off"
        for spec in specs
        for subset in spec.subsets
        if subset.varies_pictures
    ]


def _report_findings(findings: Findings, skip_broken: bool) -> None:
    """Stop, with all that is wrong; or note what is left out."""
    broken = findings.broken
    if skip_broken and broken:
        shown = "".join(f"\n  - {line}" for line in broken)
        findings.notes.append(f"{len(broken)} broken pictures are left out:{shown}")
        broken = []
    if broken:
        advice = "repair, replace or remove such pictures; --skip_broken_images trains without them"
        broken = [*broken[:-1], f"{broken[-1]}\n    {advice}"]
    if findings.problems or broken:
        raise UserError.listing(findings.problems + broken)


def _describe(number: int, pictures: PictureSet, validates: bool) -> list[str]:
    spec = pictures.spec
    sizes = f"{spec.resolution[0]}×{spec.resolution[1]}"
    if spec.enable_bucket and spec.bucket_no_upscale:
        sizes += f", buckets in steps of {spec.bucket_reso_steps} without upscaling"
    elif spec.enable_bucket:
        limits = f"{spec.min_bucket_reso} to {spec.max_bucket_reso}"
        sizes += f", buckets of {limits} in steps of {spec.bucket_reso_steps}"
    kind = "validation dataset" if validates else "dataset"
    lines = [f"{kind} {number}: {sizes}, batch size {spec.batch_size}"]
    lines += [
        f"  {_describe_subset(subset, pictures)}"
        for subset in spec.subsets
        if pictures.pictures_of(subset)
    ]
    if spec.enable_bucket:
        lines += [f"  {w}×{h}: {count}" for (w, h), count in pictures.bucket_counts().items()]
    return lines


def _describe_subset(subset: SubsetSpec, pictures: PictureSet) -> str:
    words = [f"{pictures.pictures_of(subset)} pictures"]
    records = [each for each in pictures.records if each.subset.source == subset.source]
    repeats = sorted({record.repeats for record in records})
    span = f"{repeats[0]}–{repeats[-1]}" if len(repeats) > 1 else str(repeats[0])
    words.append(f"× {span}")
    if subset.is_reg:
        words.append("for regularization")
    switches = ("shuffle_caption", "flip_aug", "color_aug", "random_crop", "alpha_mask")
    words += [name for name in switches if getattr(records[0].subset, name)]
    if subset.keep_tokens:
        words.append(f"keep_tokens {subset.keep_tokens}")
    return f"{subset.source}: {' '.join(words[:2])}{''.join(f', {word}' for word in words[2:])}"
