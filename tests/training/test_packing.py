"""The planner: every sample once, no row over its budget, all processes with equal work, resuming changes nothing."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.packing import PackedSampler, Rows, pack_rows, share_out
from training.padding import describe_packing, padding_share
from training.sampling import BatchPlan, SampleKey

BUDGET = 60


@st.composite
def plans(draw: st.DrawFn) -> tuple[BatchPlan, list[int]]:
    """A plan and the lengths of its samples."""
    world_size, at_once, accumulated = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, BUDGET), min_size=1, max_size=40))
    return BatchPlan(
        len(lengths), world_size * at_once * accumulated, at_once, world_size, draw(st.integers(0, 9))
    ), lengths


def sampler(plan: BatchPlan, lengths: list[int], first_step: int = 0, steps: int = 6, rank: int = 0) -> PackedSampler:
    return PackedSampler(lambda key: lengths[key.sample], BUDGET, plan, first_step, steps, rank)


def keys_of(rows: Rows) -> list[SampleKey]:
    return [key for row in rows for key in row]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=60),
    multiple=st.integers(1, 5),
)
def test_rows_hold_every_sample_once_and_keep_the_budget(lengths: list[int], multiple: int) -> None:
    lengths = lengths * multiple
    rows = pack_rows(lengths, BUDGET, multiple)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    loads = [sum(lengths[position] for position in row) for row in rows]
    assert max(loads) <= BUDGET
    assert loads == sorted(loads, reverse=True)
    assert len(rows) % multiple == 0
    assert all(rows)  # a process without a sample would have nothing to compute
    # adding a sample to the shortest row at a time keeps rows within a longest sample of each other
    assert max(loads) - min(loads) <= max(lengths)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, BUDGET), min_size=30, max_size=60))
def test_rows_are_few(lengths: list[int]) -> None:
    # the shortest row is over half full, or two of its kind would have been one: longest first wastes no more
    assert len(pack_rows(lengths, BUDGET)) <= 2 * -(-sum(lengths) // BUDGET) + 1


def test_a_sample_longer_than_a_row_and_uneven_shares_are_errors() -> None:
    with pytest.raises(ValueError, match="61 tokens does not fit a row of max_length 60"):
        pack_rows([3, 61], BUDGET)
    with pytest.raises(ValueError, match="3 samples cannot be shared out evenly to 2"):
        pack_rows([3, 6, 2], BUDGET, 2)


@settings(deadline=None)
@given(rows=st.integers(1, 12), world_size=st.integers(1, 4), at_once=st.integers(1, 5))
def test_every_process_has_as_many_rows_in_every_micro_batch(rows: int, world_size: int, at_once: int) -> None:
    shared = share_out([[number] for number in range(rows * world_size)], world_size, at_once)
    sizes = [[len(part) for part in parts] for parts in shared]
    assert all(len(parts) == world_size and len(set(parts)) == 1 for parts in sizes)
    assert max(map(max, sizes)) <= at_once
    assert max(map(max, sizes)) - min(map(min, sizes)) <= 1
    assert len(shared) == -(-rows // at_once)
    handed_out = [row for parts in shared for part in parts for row in part]
    assert sorted(handed_out) == [[number] for number in range(rows * world_size)]


@settings(deadline=None)
@given(case=plans())
def test_a_step_learns_from_the_samples_it_would_learn_from_without_packing(case: tuple[BatchPlan, list[int]]) -> None:
    plan, lengths = case
    ranks = [sampler(plan, lengths, rank=rank) for rank in range(plan.world_size)]
    reading = [iter(one) for one in ranks]
    seen: list[SampleKey] = []
    for step in range(6):
        counts = {one.micro_batches(step) for one in ranks}
        assert len(counts) == 1
        of_step: list[SampleKey] = []
        for _ in range(counts.pop()):
            parts = [next(rows) for rows in reading]
            assert len({len(rows) for rows in parts}) == 1
            assert all(1 <= len(rows) <= plan.per_device_batch_size for rows in parts)
            assert all(sum(lengths[key.sample] for key in row) <= BUDGET for rows in parts for row in rows)
            of_step += [key for rows in parts for key in keys_of(rows)]
        expected = [
            key
            for micro in range(plan.accumulation_steps)
            for rank in range(plan.world_size)
            for key in plan.keys(step, micro, rank)
        ]
        assert Counter(of_step) == Counter(expected)
        seen += of_step
    assert all(next(rows, None) is None for rows in reading)
    whole = [epoch for epoch in range(6) if (epoch + 1) * plan.num_samples <= len(seen)]
    for epoch in whole:
        assert sorted(key.sample for key in seen if key.epoch == epoch) == list(range(plan.num_samples))


@settings(deadline=None)
@given(case=plans(), first_step=st.integers(0, 6), data=st.data())
def test_resuming_reads_what_a_straight_run_reads(
    case: tuple[BatchPlan, list[int]], first_step: int, data: st.DataObject
) -> None:
    plan, lengths = case
    rank = data.draw(st.integers(0, plan.world_size - 1))
    straight = sampler(plan, lengths, rank=rank)
    skipped = sum(straight.micro_batches(step) for step in range(first_step))
    assert list(sampler(plan, lengths, first_step, rank=rank)) == list(straight)[skipped:]


def test_share_of_padding() -> None:
    assert padding_share([[3, 1], [4]]) == pytest.approx(2 / 10)


def test_what_packing_gains_is_told() -> None:
    lengths = [50, 10] * 8
    text = describe_packing(BatchPlan(16, 16, 4, 1, 0), 4, lengths, BUDGET)
    assert "8.0 rows hold the 16 samples of a step" in text
    assert "0.0% of the tokens are padding" in text
