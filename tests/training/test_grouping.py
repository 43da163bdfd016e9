"""Grouped sampling: a permutation for every epoch and kind of data, with less padding, the same on every process."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.grouping import GROUPED_STEPS, grouped_order
from training.padding import describe_grouping, padded_rows, padding_share
from training.sampling import BatchPlan, epoch_permutation

KINDS = st.sampled_from(["none", "all", "some"])


def lengths_of(count: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randint(10, 500) for _ in range(count)]


def kinds_of(count: int, kind: str) -> list[bool]:
    return [kind == "all" or (kind == "some" and number % 7 > 0) for number in range(count)]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=60),
    batch=st.integers(1, 20),
    seed=st.integers(0, 9),
    kind=KINDS,
)
def test_an_epoch_visits_every_sample_once(lengths: list[int], batch: int, seed: int, kind: str) -> None:
    """Also where all lengths are equal or 0, all samples of one kind, or fewer than a step takes."""
    order = grouped_order(lengths, seed, batch, kinds_of(len(lengths), kind))
    for epoch in range(4):
        assert sorted(order(epoch)) == list(range(len(lengths)))
        assert order(epoch) == grouped_order(lengths, seed, batch, kinds_of(len(lengths), kind))(epoch)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_steps_hold_samples_of_like_length_in_random_order_of_steps(epoch: int) -> None:
    count, batch = 1003, 16
    lengths = lengths_of(count)
    plan = BatchPlan(count, batch, batch, 1, 0, order=grouped_order(lengths, 0, batch))
    first, last = -(-epoch * count // batch), (epoch + 1) * count // batch  # the epoch's whole steps
    steps = [[lengths[key.sample] for key in plan.keys_of_step(step)] for step in range(first, last)]
    assert all(step == sorted(step) for step in steps)
    window = steps[:GROUPED_STEPS]
    ranges = sorted((min(step), max(step)) for step in window)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))
    means = [sum(step) for step in window]
    assert means not in (sorted(means), sorted(means, reverse=True))


def test_steps_hold_one_kind_but_one_a_window() -> None:
    count, batch = 4 * GROUPED_STEPS * 8, 8
    kinds = kinds_of(count, "some")
    plan = BatchPlan(count, batch, batch, 1, 0, order=grouped_order(lengths_of(count), 0, batch, kinds))
    mixed = [len({kinds[key.sample] for key in plan.keys_of_step(step)}) > 1 for step in range(count // batch)]
    for begin in range(0, len(mixed), GROUPED_STEPS):
        assert sum(mixed[begin : begin + GROUPED_STEPS]) <= 1
    without = BatchPlan(count, batch, batch, 1, 0)
    assert (
        sum(len({kinds[key.sample] for key in without.keys_of_step(step)}) > 1 for step in range(count // batch)) > 50
    )


def test_processes_and_accumulation_change_nothing_but_who_does_the_work() -> None:
    lengths = lengths_of(90)
    order = grouped_order(lengths, 3, 12)
    alone = BatchPlan(90, 12, 12, 1, 3, order=order)
    shared = replace(alone, per_device_batch_size=2, world_size=3)
    for step in range(20):
        parts = [key for micro in range(2) for rank in range(3) for key in shared.keys(step, micro, rank)]
        assert parts == alone.keys(step, 0, 0) == alone.keys_of_step(step)


def test_padding_falls_and_is_told() -> None:
    lengths = lengths_of(2000)
    plan = BatchPlan(2000, 32, 8, 2, 0, order=grouped_order(lengths, 0, 32))
    grouped = padding_share(padded_rows(plan, 60, lengths))
    at_random = padding_share(padded_rows(replace(plan, order=None), 60, lengths))
    assert grouped < 0.03 < 0.3 < at_random
    text = describe_grouping(plan, 60, lengths, "length")
    assert text.startswith(f"grouped by length: {grouped:.1%} of the tokens are padding ({at_random:.1%} in random")
    assert "warning" not in text


def test_grouping_that_gains_nothing_is_told() -> None:
    lengths = lengths_of(7)  # fewer samples than a step: each step has whole epochs in it
    plan = BatchPlan(7, 14, 14, 1, 0, order=grouped_order(lengths, 0, 14))
    assert "warning: grouping gains nothing here" in describe_grouping(plan, 3, lengths, "length")


def test_the_order_differs_from_epoch_to_epoch_and_from_seed_to_seed() -> None:
    lengths = lengths_of(64)
    orders = {tuple(grouped_order(lengths, seed, 8)(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(epoch_permutation(64, 0, 0)) not in orders
