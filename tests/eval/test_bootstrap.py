"""Intervals: clusters count, coverage is what it says, the boundary is not certainty."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.bootstrap import cluster_sums, estimate, wilson_interval
from eval.metrics.yes_no import pope_f1


def components(scores: np.ndarray) -> np.ndarray:
    return np.column_stack([scores, np.ones(len(scores))])


@given(scores=st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=60), groups=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_interval_holds_the_mean_and_stays_in_range(scores: list[float], groups: int) -> None:
    clusters = [str(index % groups) for index in range(len(scores))]
    result = estimate(components(np.array(scores)), clusters, resamples=200)
    low, high = result["ci95"]
    assert result["value"] == pytest.approx(np.mean(scores))
    assert 0 <= low <= high <= 1


def test_cluster_sums_do_not_depend_on_order() -> None:
    rows = np.array([[1.0, 1], [0, 1], [1, 1]])
    assert cluster_sums(rows, ["b", "a", "b"]).tolist() == [[0, 1], [2, 2]]


def test_same_seed_same_interval() -> None:
    scores = components(np.random.default_rng(1).integers(0, 2, 300).astype(float))
    clusters = [str(index // 10) for index in range(300)]
    assert estimate(scores, clusters) == estimate(scores, clusters)


def test_copies_within_a_cluster_add_no_certainty() -> None:
    scores = np.random.default_rng(0).integers(0, 2, 100).astype(float)
    alone = estimate(components(scores), [str(index) for index in range(100)])
    copied = estimate(components(np.repeat(scores, 10)), [str(index // 10) for index in range(1000)])
    assert copied["se"] == pytest.approx(alone["se"], rel=1e-9)
    assert copied["se"] == pytest.approx(scores.std() / 10, rel=0.1), "the textbook standard error of a mean"


def test_a_ratio_is_resampled_as_a_ratio() -> None:
    rows = np.random.default_rng(0).integers(1, 5, (50, 2)).astype(float)
    result = estimate(rows, [str(index) for index in range(50)], statistic=lambda sums: sums[..., 0] / sums[..., 1])
    assert result["value"] == pytest.approx(rows[:, 0].sum() / rows[:, 1].sum())
    assert result["ci95"][0] < result["value"] < result["ci95"][1]


def test_intervals_cover_the_truth_at_the_nominal_rate() -> None:
    generator = np.random.default_rng(7)
    images, questions, hits, trials = 150, 6, 0, 300
    for _ in range(trials):
        difficulty = generator.beta(8, 2, size=images)  # mean 0.8, shared by the questions about one image
        scores = (generator.random((images, questions)) < difficulty[:, None]).astype(float).ravel()
        clusters = [str(index // questions) for index in range(images * questions)]
        low, high = estimate(components(scores), clusters, resamples=300)["ci95"]
        hits += low <= 0.8 <= high
    assert 0.91 <= hits / trials <= 0.98


def test_perfect_score_is_not_certainty() -> None:
    result = estimate(components(np.ones(250)), [str(index // 10) for index in range(250)])
    assert result["method"] == "wilson"
    assert result["se"] is None
    assert result["ci95"] == [pytest.approx(0.8668, abs=1e-4), 1.0], "25 images, not 250 questions"


def test_a_perfect_ratio_is_not_certainty_either() -> None:
    hits = np.tile([1.0, 0, 0, 0, 0], (100, 1))
    result = estimate(hits, [str(index // 4) for index in range(100)], pope_f1)
    assert result["method"] == "wilson"
    assert result["ci95"] == [pytest.approx(0.8668, abs=1e-4), 1.0]


def test_no_difference_is_a_difference_like_any_other() -> None:
    clusters = [str(index) for index in range(20)]
    result = estimate(np.ones((20, 2)), clusters, lambda sums: sums[..., 0] - sums[..., 1], largest=None)
    assert (result["method"], result["ci95"]) == ("cluster_bootstrap", [0, 0])


def test_a_centred_interval_holds_a_value_that_drawing_raises() -> None:
    true = np.tile(np.eye(3), (60, 1))
    said = np.roll(true, 1, axis=0)  # every answer is given as often as it is true, and is always wrong

    def chi_square(sums: np.ndarray) -> np.ndarray:
        return ((sums[..., :3] - sums[..., 3:]) ** 2 / sums[..., 3:]).sum(axis=-1)

    rows, clusters = np.hstack([said, true]), [str(index) for index in range(180)]
    plain = estimate(rows, clusters, chi_square)
    centred = estimate(rows, clusters, chi_square, is_centred=True)
    assert plain["value"] == 0 < plain["ci95"][0], "all draws lie above the value"
    assert centred["ci95"][0] < centred["value"] < centred["ci95"][1]
    assert np.diff(centred["ci95"]) == pytest.approx(np.diff(plain["ci95"]))
    assert centred["method"] == "cluster_bootstrap_centred"
    nothing = estimate(np.zeros((9, 2)), clusters[:9], lambda sums: sums[..., 0], largest=None, is_centred=True)
    assert nothing["ci95"] == [0, 0]


def test_wilson_interval_of_no_success_in_25() -> None:
    assert wilson_interval(0, 25) == (0.0, pytest.approx(0.1332, abs=1e-4))


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        estimate(np.zeros((0, 2)), [])


def test_one_image_is_not_certainty() -> None:
    half = estimate(components(np.array([1.0, 0.0])), ["same", "same"])
    assert (half["value"], half["se"], half["method"]) == (0.5, None, "wilson")
    assert half["ci95"] == [pytest.approx(0.0546, abs=1e-4), pytest.approx(0.9454, abs=1e-4)]
    tenths = estimate(components(np.tile([0.1, 0.3, 0.9], 99)[::-1]), ["same"] * 297)
    assert tenths["method"] == "wilson"
    unbounded = estimate(components(np.array([1.0, 0.0])), ["same", "same"], largest=None)
    assert (unbounded["value"], unbounded["ci95"], unbounded["method"]) == (0.5, None, "none")


def test_full_marks_on_another_scale_are_not_certainty() -> None:
    clusters = [str(index) for index in range(25)]
    result = estimate(np.ones((25, 2)), clusters, lambda sums: 200 * sums[..., 0] / sums[..., 1], largest=200)
    assert result["ci95"] == [pytest.approx(200 * 0.8668, abs=0.01), 200]


def test_draws_without_a_question_of_the_kind_do_not_count() -> None:
    rows = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    result = estimate(rows, ["a", "b", "c"], resamples=500)
    assert result["value"] == 0.5
    assert result["ci95"] == [0, 1]


def test_what_is_not_asked_has_no_value() -> None:
    result = estimate(np.zeros((2, 2)), ["a", "b"])
    assert (result["value"], result["ci95"]) == (None, None)


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_bootstrap_is_that_of_plain_loops(rows: list[tuple[int, int, int]], seed: int) -> None:
    """Draw clusters one by one, copy their rows, and take the ratio of the copies' sums."""
    clusters = sorted({cluster for cluster, _, _ in rows})
    generator, draws = np.random.default_rng(seed), []
    for counts in generator.multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), size=40):
        times = dict(zip(clusters, counts, strict=True))
        drawn = [row for row in rows for _ in range(times[row[0]])]
        whole = sum(row[1] + row[2] for row in drawn)
        draws += [sum(row[1] for row in drawn) / whole] if whole else []
    result = estimate(
        np.array([[right, right + wrong] for _, right, wrong in rows], float),
        [str(cluster) for cluster, _, _ in rows],
        resamples=40,
        seed=seed,
    )
    if result["method"] == "cluster_bootstrap":
        assert result["ci95"] == pytest.approx(list(np.percentile(draws, [2.5, 97.5])))
        assert result["se"] == pytest.approx(np.std(draws, ddof=1))
