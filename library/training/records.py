"""The pictures of a run with all that is known of them before they are opened for training."""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from library.training.buckets import Placement, Size, place_fixed
from library.training.dataset_config import DatasetSpec, SubsetSpec
from library.training.picture_files import BrokenPicture, PictureInfo, find_pictures
from library.training.size_cache import SizeCache
from library.training.sources import Findings, Listed, list_pictures

_SAME_SHAPE = 0.02  # how far a mask's aspect ratio may be from its picture's


@dataclass(frozen=True)
class Record:
    """One picture of one subset."""

    key: str  # names it for random streams: the same after a resume and in another folder
    path: str
    caption: str  # as it was written
    subset: SubsetSpec
    size: Size
    placement: Placement
    repeats: int
    mask_path: str | None = None


@dataclass
class PictureSet:
    """A dataset: its description and its pictures, for training or for validation."""

    spec: DatasetSpec
    records: list[Record]
    regularization_found: int = 0  # with repeats, before they were matched with the others

    @property
    def num_train_images(self) -> int:
        """Pictures that are not for regularization, with repeats."""
        return sum(record.repeats for record in self.records if not record.subset.is_reg)

    def pictures_of(self, subset: SubsetSpec) -> int:
        """How many pictures `subset` has here."""
        return sum(record.subset.source == subset.source for record in self.records)

    def bucket_counts(self) -> dict[Size, int]:
        """Samples an epoch of each size, smallest size first."""
        counts: Counter[Size] = Counter()
        for record in self.records:
            counts[record.placement.bucket] += record.repeats
        return dict(sorted(counts.items()))

    def mean_aspect_error(self) -> float:
        """How far buckets are from their pictures' aspect ratios, on average."""
        errors = [
            abs(bucket[0] / bucket[1] - record.size[0] / record.size[1])
            for record in self.records
            for bucket in (record.placement.bucket,)
        ]
        return sum(errors) / len(errors) if errors else 0.0

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """How often each tag was written, by the name of its folder or metadata file."""
        frequency: dict[str, Counter[str]] = {}
        for record in self.records:
            name = os.path.basename(record.subset.source)
            tags = (tag.strip().lower() for tag in record.caption.split(","))
            frequency.setdefault(name, Counter()).update(tag for tag in tags if tag)
        return {name: dict(counts) for name, counts in frequency.items()}


def gather(
    spec: DatasetSpec, number: int, seed: int, findings: Findings
) -> tuple[PictureSet, PictureSet]:
    """The pictures of dataset `number` for training and for validation.

    Args:
        seed: decides which pictures are held out, where the subset has no validation_seed.
        findings: receives what is wrong or worth knowing.
    """
    training: list[Record] = []
    held_out: list[Record] = []
    for index, subset in enumerate(spec.subsets):
        records = _records(subset, spec, f"{number}/{index}", findings)
        kept, apart = split(records, subset, seed)
        training += kept
        held_out += [
            dataclasses.replace(record, subset=subset.for_validation(), repeats=1)
            for record in apart
        ]
    found = sum(record.repeats for record in training if record.subset.is_reg)
    training = balance_regularization(training)
    unused = found - sum(record.repeats for record in training if record.subset.is_reg)
    if unused > 0:
        findings.notes.append(
            f"dataset {number}: {unused} of {found} regularization samples are not used, as there "
            "are fewer of the others"
        )
    return PictureSet(spec, training, found), PictureSet(spec, held_out)


def _records(subset: SubsetSpec, spec: DatasetSpec, key: str, findings: Findings) -> list[Record]:
    listed = list_pictures(subset, findings)
    masks = _find_masks(listed, subset, findings)
    infos = _inspect(SizeCache.of(subset), {each.path: each.caption for each in listed}, findings)
    if subset.conditioning_data_dir is not None:
        cache = SizeCache.of_source(subset.conditioning_data_dir)
        infos |= _inspect(cache, dict.fromkeys(masks.values(), ""), findings)
    records = []
    for each in listed:
        mask = masks.get(each.path)
        try:
            size = _sound(each.path, infos[each.path]).size
            if mask is not None:
                _check_mask(mask, _sound(mask, infos[mask]).size, size)
            if spec.buckets is None:
                placement = place_fixed(size, spec.resolution, subset.random_crop)
            else:
                placement = spec.buckets.place(size)
        except BrokenPicture as reason:
            findings.broken.append(str(reason))
        except ValueError as reason:
            findings.broken.append(f"{each.path}: {reason}")
        else:
            repeats = subset.num_repeats
            name = f"{key}/{each.name}"
            records.append(
                Record(name, each.path, each.caption, subset, size, placement, repeats, mask)
            )
    return records


def _inspect(
    cache: SizeCache, captions: dict[str, str], findings: Findings
) -> dict[str, PictureInfo | BrokenPicture]:
    """What is known of pictures, which their captions name."""
    infos = cache.inspect(captions)
    if problem := cache.save(infos, captions):
        findings.notes.append(problem)
    return infos


def _sound(path: str, info: PictureInfo | BrokenPicture) -> PictureInfo:
    if isinstance(info, BrokenPicture):
        raise BrokenPicture(f"{path}: {info}")
    return info


def _find_masks(listed: list[Listed], subset: SubsetSpec, findings: Findings) -> dict[str, str]:
    """The mask picture of each picture: the one of the same name in conditioning_data_dir."""
    if subset.conditioning_data_dir is None:
        return {}
    by_name = {_stem(path): path for path in find_pictures(subset.conditioning_data_dir)}
    missing = [os.path.basename(each.path) for each in listed if _stem(each.path) not in by_name]
    if missing:
        findings.problems.append(
            f"{subset.conditioning_data_dir}: no mask of the same name for {', '.join(missing)}"
        )
    return {each.path: by_name[_stem(each.path)] for each in listed if _stem(each.path) in by_name}


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _check_mask(path: str, size: Size, picture: Size) -> None:
    if abs(size[0] / size[1] * picture[1] / picture[0] - 1) > _SAME_SHAPE:
        raise BrokenPicture(
            f"{path}: the mask is {size[0]}×{size[1]}, of another shape than its picture "
            f"({picture[0]}×{picture[1]})"
        )


def split(
    records: list[Record], subset: SubsetSpec, seed: int
) -> tuple[list[Record], list[Record]]:
    """The pictures to train on and those held out for validation; none is in both.

    The order is shuffled by the subset's validation_seed, or `seed`, and the last
    round(validation_split · n) are held out: those that sd-scripts validates on. Pictures for
    regularization are never held out.
    """
    count = round(len(records) * subset.validation_split)
    if subset.is_reg or count == 0:
        return records, []
    order = list(range(len(records)))
    chosen = subset.validation_seed if subset.validation_seed is not None else seed
    random.Random(chosen).shuffle(order)
    apart = set(order[len(order) - count :])
    kept = [record for index, record in enumerate(records) if index not in apart]
    return kept, [record for index, record in enumerate(records) if index in apart]


def balance_regularization(records: Sequence[Record]) -> list[Record]:
    """`records` with as many samples for regularization as there are of the others.

    As in sd-scripts: regularization pictures are taken in order, with their own repeats, until
    there are enough; where they are too few, each gets one repeat more in turn.
    """
    subject = [record for record in records if not record.subset.is_reg]
    regularization = [record for record in records if record.subset.is_reg]
    wanted = sum(record.repeats for record in subject)
    taken: list[Record] = []
    total = 0
    for record in regularization:
        if total >= wanted:
            break
        taken.append(record)
        total += record.repeats
    if taken and total < wanted:
        each, rest = divmod(wanted - total, len(taken))
        taken = [
            dataclasses.replace(record, repeats=record.repeats + each + (index < rest))
            for index, record in enumerate(taken)
        ]
    return subject + taken
