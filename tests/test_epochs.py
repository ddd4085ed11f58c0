"""An epoch's batches: every sample, in an order that seed, epoch and processes decide."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.training.epochs import Group, Sample, batch_count, plan_epoch, share


def groups_of(*counts: int, batch_size: int = 3) -> list[Group]:
    return [
        Group(batch_size, [Sample(0, 100 * group + index, 0) for index in range(count)])
        for group, count in enumerate(counts)
    ]


@settings(deadline=None)  # a busy machine is no failure
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    batch_size=st.integers(1, 4),
    processes=st.integers(1, 4),
    epoch=st.integers(0, 5),
)
def test_every_sample_comes_once(
    counts: list[int], batch_size: int, processes: int, epoch: int
) -> None:
    groups = groups_of(*counts, batch_size=batch_size)
    batches = plan_epoch(groups, 1, epoch, processes)
    assert len(batches) == batch_count(groups, processes)
    flat = Counter(sample for batch in batches for sample in batch if sample.repeat >= 0)
    assert flat == Counter(sample for group in groups for sample in group.samples)
    for batch in batches:
        assert len(batch) <= batch_size * processes
        assert len({sample.record // 100 for sample in batch}) == 1  # one size a batch
        assert len(set(batch)) == len(batch)  # what fills a batch up has its own stream
        parts = [share(batch, process, processes) for process in range(processes)]
        assert len({len(part) for part in parts}) == 1
        assert [sample for part in parts for sample in part] == batch


def test_filling_up_is_only_for_what_cannot_be_shared() -> None:
    filled = [
        sample
        for batch in plan_epoch(groups_of(8), 1, 0, 2)
        for sample in batch
        if sample.repeat < 0
    ]
    assert filled == []
    filled = [
        sample
        for batch in plan_epoch(groups_of(7), 1, 0, 2)
        for sample in batch
        if sample.repeat < 0
    ]
    assert len(filled) == 1


def test_two_processes_see_what_one_with_a_double_batch_sees() -> None:
    one = plan_epoch(groups_of(12, 6, batch_size=4), 5, 2, 1)
    two = plan_epoch(groups_of(12, 6, batch_size=2), 5, 2, 2)
    assert one == two


def test_seed_and_epoch_decide_the_order() -> None:
    groups = groups_of(10, 10)
    assert plan_epoch(groups, 1, 0, 1) == plan_epoch(groups, 1, 0, 1)
    assert plan_epoch(groups, 1, 0, 1) != plan_epoch(groups, 1, 1, 1)
    assert plan_epoch(groups, 1, 0, 1) != plan_epoch(groups, 2, 0, 1)
    together = [{frozenset(batch) for batch in plan_epoch(groups, 1, epoch, 1)} for epoch in (0, 1)]
    assert together[0] != together[1]  # other pictures share a batch, too
    # Sizes are mixed over the epoch, not one after the other.
    firsts = [batch[0].record // 100 for batch in plan_epoch(groups_of(60, 60), 1, 0, 1)]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("epoch", [0, 3])
def test_without_shuffling_the_order_is_that_of_the_files(epoch: int) -> None:
    batches = plan_epoch(groups_of(4, 2), 1, epoch, 1, shuffle=False)
    assert [[sample.record for sample in batch] for batch in batches] == [
        [0, 1, 2],
        [3],
        [100, 101],
    ]
