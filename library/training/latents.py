"""The latent cache: each picture is encoded once, and its latents are kept in memory or in files.

A file lies beside its picture, one for each resolution and way of making it (VAE, scaling, mask):
`cat.png.512x768-1f0c9a2b.latents.safetensors`. Its metadata holds the hash of the picture's
content, so that a changed picture is encoded anew; a picture whose length and time are as they were
is not read for that.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from library.training.errors import UserError
from library.training.files import write_atomically
from library.training.images import Picture, content_hash, prepare
from library.training.picture_files import stamp
from library.training.randomness import derive_seed
from library.training.records import Record

_VERSION = "1"
_AHEAD = 2  # batches whose pictures are opened while the VAE is at work


class Encoder(Protocol):
    """What the cache needs of a model."""

    @property
    def vae_key(self) -> str:
        """Names the VAE's weights."""

    @property
    def vae_factor(self) -> int:
        """Pixels on each side of a latent cell."""

    def encode_images(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Scaled, finite latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]."""


Progress = Callable[[int, int], None]  # (pictures done, pictures in all)


def latent_seed(content: str) -> int:
    """The seed of the VAE's draw for a picture, by its content hash.

    It depends on nothing else, so that latents are the same cached and uncached, and a cache file
    is what another run would have made.
    """
    return derive_seed(0, "latent", content)


@dataclass(frozen=True)
class Job:
    """One cache entry to be made: a picture, at one size, in one way."""

    path: Path  # of its file; also its name in memory
    record: Record
    with_flipped: bool


@dataclass
class LatentStore:
    """Cached latents, to be read by record. It pickles, so that loader workers can have it."""

    vae_key: str
    in_memory: dict[Path, dict[str, Tensor]] = field(default_factory=dict)

    def read(self, record: Record, flipped: bool) -> tuple[Tensor, Tensor | None]:
        """Latents [C, h, w] and the mask [1, H, W] in [0, 1], if it hides anything."""
        path = cache_path(record, self.vae_key)
        tensors = self.in_memory.get(path)
        if tensors is not None:
            latents, mask = tensors["flipped" if flipped else "latents"], tensors.get("mask")
        else:
            latents, mask = _load(path, record, flipped)
        if mask is not None:
            mask = mask.float() / 255
            mask = mask.flip(-1) if flipped else mask
        return latents, mask


def _load(path: Path, record: Record, flipped: bool) -> tuple[Tensor, Tensor | None]:
    try:
        with safe_open(path, framework="pt") as file:
            latents = file.get_tensor("flipped" if flipped else "latents")
            mask = file.get_tensor("mask") if "mask" in file.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: the cached latents of {record.path} cannot be read ({error}): delete the "
            "file and train without --skip_cache_check, which makes it anew"
        ) from None
    return latents, mask


def cache_path(record: Record, vae_key: str) -> Path:
    """The cache file of a picture: its name holds all that decides how latents are made of it."""
    width, height = record.placement.bucket
    how = (
        _VERSION,
        vae_key,
        record.placement.resized,
        record.subset.resize_interpolation,
        record.subset.alpha_mask,
        record.subset.conditioning_data_dir if record.mask_path else None,
    )
    key = hashlib.blake2b(repr(how).encode(), digest_size=4).hexdigest()
    return Path(f"{record.path}.{width}x{height}-{key}.latents.safetensors")


def fill_cache(
    records: Iterable[Record],
    encoder: Encoder,
    *,
    to_disk: bool,
    batch_size: int = 1,
    trust_files: bool = False,
    progress: Progress | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> LatentStore:
    """Encode the pictures of `records`, those that have no valid cache file.

    In files, each process makes its share, and all must have finished before any reads: wait for
    the others after this. In memory, each process makes all.

    Args:
        batch_size: pictures of one size that the VAE encodes at a time.
        trust_files: take files that are there for valid (`--skip_cache_check`).
        progress: called with the number of pictures done and their total.
    """
    store = LatentStore(encoder.vae_key)
    jobs = _jobs(records, encoder.vae_key)
    total = len(jobs)
    if to_disk:
        mine = jobs[process_index::num_processes]
        total = len(mine)
        with ThreadPoolExecutor() as pool:
            valid = list(pool.map(lambda job: _is_valid(job, trust_files), mine))
        jobs = [job for job, is_valid in zip(mine, valid, strict=True) if not is_valid]
    done = total - len(jobs)
    if progress is not None:
        progress(done, total)
    for job, tensors, picture in _encode(jobs, encoder, batch_size):
        if to_disk:
            _save(job, tensors, picture)
        else:
            store.in_memory[job.path] = tensors
        done += 1
        if progress is not None:
            progress(done, total)
    return store


def _jobs(records: Iterable[Record], vae_key: str) -> list[Job]:
    """One job for each different cache entry, pictures of one size together."""
    jobs: dict[Path, Job] = {}
    for record in records:
        path = cache_path(record, vae_key)
        known = jobs.get(path)
        flipped = record.subset.flip_aug or (known is not None and known.with_flipped)
        jobs[path] = Job(path, record, flipped)
    return sorted(jobs.values(), key=lambda job: (job.record.placement.bucket, str(job.path)))


def _encode(
    jobs: list[Job], encoder: Encoder, batch_size: int
) -> Iterator[tuple[Job, dict[str, Tensor], Picture]]:
    """Each job with its tensors: `latents`, `flipped` and `mask` where they are wanted."""
    batches = []
    for _, same_size in groupby(jobs, key=lambda job: job.record.placement.bucket):
        queue = list(same_size)
        batches += [queue[i : i + batch_size] for i in range(0, len(queue), batch_size)]
    for batch, pictures in _opened_ahead(batches):
        images = torch.stack([picture.pixels for picture in pictures])
        seeds = [latent_seed(picture.content) for picture in pictures]
        try:
            latents = _encode_images(encoder, images, seeds)
            mirrored = None
            if any(job.with_flipped for job in batch):
                mirrored = _encode_images(encoder, images.flip(-1), seeds)
        except UserError as error:
            raise UserError(f"{', '.join(job.record.path for job in batch)}: {error}") from None
        for index, (job, picture) in enumerate(zip(batch, pictures, strict=True)):
            tensors = {"latents": latents[index]}
            if mirrored is not None and job.with_flipped:
                tensors["flipped"] = mirrored[index]
            if picture.mask is not None and picture.mask.min() < 1:
                tensors["mask"] = (picture.mask * 255).round().to(torch.uint8)
            yield job, tensors, picture


def _encode_images(encoder: Encoder, images: Tensor, seeds: list[int]) -> list[Tensor]:
    """Latents one by one: each with memory of its own, which a batch's slices would share."""
    latents = encoder.encode_images(images, seeds).float().cpu()
    return [each.clone(memory_format=torch.contiguous_format) for each in latents]


def _opened_ahead(batches: list[list[Job]]) -> Iterator[tuple[list[Job], list[Picture]]]:
    """Each batch with its pictures, which threads open while the batches before are encoded."""
    waiting: deque[tuple[list[Job], list[Future[Picture]]]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for batch in batches:
            waiting.append((batch, [pool.submit(_open, job.record) for job in batch]))
            if len(waiting) > _AHEAD:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        for ready, futures in waiting:
            yield ready, [future.result() for future in futures]


def _open(record: Record) -> Picture:
    return prepare(record.path, record.mask_path, record.subset, record.placement)


def _save(job: Job, tensors: dict[str, Tensor], picture: Picture) -> None:
    mask = job.record.mask_path
    metadata = {
        "picture": picture.content,
        "picture_stamp": stamp(job.record.path),
        "mask": _hash_of(mask) if mask else "",
        "mask_stamp": stamp(mask) if mask else "",
    }
    try:
        write_atomically(job.path, lambda path: save_file(tensors, path, metadata))
    except OSError as error:
        raise UserError(
            f"{job.path}: the latents cannot be written ({error.strerror}): use --cache_latents "
            "(in memory) without --cache_latents_to_disk, or make the folder writable"
        ) from None


def _is_valid(job: Job, trust: bool) -> bool:
    """Whether the job's file is whole and of the picture and mask as they are now."""
    if not job.path.is_file():
        return False
    if trust:
        return True
    try:
        with safe_open(job.path, framework="pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
    except (OSError, SafetensorError):
        return False  # a torn file: made anew
    if job.with_flipped and "flipped" not in names:
        return False
    sources = {"picture": job.record.path, "mask": job.record.mask_path}
    return "latents" in names and all(
        _is_same(path, metadata.get(name, ""), metadata.get(f"{name}_stamp", ""))
        for name, path in sources.items()
        if path is not None
    )


def _is_same(path: str, content: str, its_stamp: str) -> bool:
    return stamp(path) == its_stamp or _hash_of(path) == content


def _hash_of(path: str) -> str:
    return content_hash(Path(path).read_bytes())
