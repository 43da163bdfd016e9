"""Repeated augmentation: how often a sample is visited, and that its visits differ."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.sampling import BatchPlan, SampleKey, epoch_permutation, mix_seed


@settings(deadline=None)
@given(num_samples=st.integers(1, 40), repeats=st.integers(1, 4), seed=st.integers(0, 100))
def test_an_epoch_keeps_its_length_and_repeats_each_sample(num_samples: int, repeats: int, seed: int) -> None:
    plan = BatchPlan(num_samples, num_samples, num_samples, 1, seed, repeats)
    for epoch in (0, 1):
        keys = plan.keys(epoch, 0, 0)
        assert {key.epoch for key in keys} == {epoch}
        assert len(set(keys)) == len(keys) == num_samples
        counts = Counter(key.sample for key in keys)
        assert len(counts) == -(-num_samples // repeats)
        assert sum(count < repeats for count in counts.values()) <= 1  # the last one, where the epoch ends
        first = epoch_permutation(num_samples, seed, epoch)[: len(counts)]
        assert [key.sample for key in keys if key.copy == 0] == first


def test_visits_in_a_row_stay_together_whoever_does_the_work() -> None:
    alone = BatchPlan(30, 12, 12, 1, seed=0, repeats=3)
    shared = BatchPlan(30, 12, 3, 2, seed=0, repeats=3)
    parts = [key for micro in range(2) for rank in range(2) for key in shared.keys(1, micro, rank)]
    assert parts == alone.keys(1, 0, 0)


def test_each_visit_has_a_seed_of_its_own_and_the_first_the_one_it_always_had() -> None:
    assert SampleKey(3, 7).seed(1, 2) == mix_seed(1, 2, 3, 7)
    seeds = {SampleKey(epoch, sample, copy).seed(1) for epoch in range(5) for sample in range(5) for copy in range(3)}
    assert len(seeds) == 75


def test_no_visit_is_an_error() -> None:
    with pytest.raises(ValueError, match="repeated_augmentation"):
        BatchPlan(10, 2, 2, 1, 0, repeats=0)
