"""Parts of an epoch keep the ratio of the weights, and say how often a source is shown."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.mixtures import mix

SOURCES = st.lists(st.tuples(st.integers(1, 200), st.floats(0.2, 5)), min_size=1, max_size=4)


def test_concatenation_takes_everything_once() -> None:
    parts = mix([3, 0, 2], [1, 1, 1], "concatenate", 0)
    assert [list(part.samples) for part in parts] == [[0, 1, 2], [], [0, 1]]


@given(SOURCES, st.integers(0, 5))
def test_without_repetition_shows_none_twice_and_uses_one_up(sources: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = zip(*sources, strict=True)
    try:
        parts = mix(sizes, weights, "without_repetition", seed)
    except ValueError:
        assert min(size / weight for size, weight in sources) * min(weights) < 1.001
        return
    assert any(len(part.samples) == size for part, size in zip(parts, sizes, strict=True))
    for part, size, weight in zip(parts, sizes, weights, strict=True):
        assert len(set(part.samples)) == len(part.samples) <= size
        assert all(0 <= sample < size for sample in part.samples)
        assert part.epochs == len(part.samples) / size
        expected = weight * min(size / weight for size, weight in sources)
        assert expected - 1 <= len(part.samples) <= expected + 1e-6


@given(SOURCES, st.integers(0, 5))
def test_with_repetition_shows_all_and_repeats_evenly(sources: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = zip(*sources, strict=True)
    parts = mix(sizes, weights, "with_repetition", seed)
    for part, size, weight in zip(parts, sizes, weights, strict=True):
        visits = Counter(part.samples.tolist())  # type: ignore[union-attr]
        assert set(visits) == set(range(size))
        assert max(visits.values()) - min(visits.values()) <= 1
        assert abs(len(part.samples) - weight * max(size / weight for size, weight in sources)) < 1.001


def test_the_seed_decides_which_samples_are_taken() -> None:
    taken = [mix([100, 10], [1, 1], "without_repetition", seed)[0].samples.tolist() for seed in (0, 0, 1)]  # type: ignore[union-attr]
    assert taken[0] == taken[1] != taken[2]


def test_a_source_without_a_sample_is_named() -> None:
    with pytest.raises(ValueError, match=r"mixture\[1\]"):
        mix([2, 1000], [1, 0.1], "without_repetition", 0)
