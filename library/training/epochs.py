"""Which samples an epoch's batches hold: a pure function of seed, epoch and number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from library.training.randomness import python_stream


class Sample(NamedTuple):
    """One repeat of one picture."""

    dataset: int
    record: int
    repeat: int


@dataclass(frozen=True)
class Group:
    """Samples that may share a batch: one size, one dataset."""

    batch_size: int
    samples: Sequence[Sample]


def batch_count(groups: Sequence[Group], num_processes: int) -> int:
    """Batches an epoch, the same for each process."""
    return sum(-(-len(group.samples) // (group.batch_size * num_processes)) for group in groups)


def plan_epoch(
    groups: Sequence[Group], seed: int, epoch: int, num_processes: int, shuffle: bool = True
) -> list[list[Sample]]:
    """The epoch's batches for all processes together, to be cut by `share`.

    Each group is shuffled and cut into batches of batch_size × num_processes, so that N processes
    see together what one with an N-fold batch would see; then all batches are shuffled. A last
    batch that N processes cannot share evenly is filled up with pictures of its group. These have
    negative repeats, and so random streams of their own.
    """
    batches = []
    for number, group in enumerate(groups):
        order = list(group.samples)
        if shuffle:
            python_stream(seed, "order", epoch, number).shuffle(order)
        size = group.batch_size * num_processes
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            missing = -len(batch) % num_processes
            fill = [order[index % len(order)] for index in range(missing)]
            batch += [each._replace(repeat=-1 - index) for index, each in enumerate(fill)]
            batches.append(batch)
    if shuffle:
        python_stream(seed, "batches", epoch).shuffle(batches)
    return batches


def share(batch: list[Sample], process_index: int, num_processes: int) -> list[Sample]:
    """The part of a global batch that one process trains on."""
    size = len(batch) // num_processes
    return batch[process_index * size : (process_index + 1) * size]
