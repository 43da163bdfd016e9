"""Metrics as statistics of sums: the sum over clusters is the sum over rows, so that clusters can be resampled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.bootstrap import cluster_sums
from eval.measures import Style, mean_of
from eval.metrics.multiple_choice import circular_accuracy, circular_sums
from eval.metrics.yes_no import mme_points, mme_sums

ROWS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 1.0])), min_size=1, max_size=30)


@given(ROWS)
def test_circular_accuracy_is_the_share_of_whole_groups(pairs: list[tuple[int, float]]) -> None:
    rows = [{"group": group, "correct": correct} for group, correct in pairs]
    groups = {group for group, _ in pairs}
    whole = [all(correct for other, correct in pairs if other == group) for group in groups]
    assert circular_accuracy(rows) == pytest.approx(sum(whole) / len(groups))
    by_cluster = cluster_sums(circular_sums(rows), [str(row["group"]) for row in rows])
    assert by_cluster.sum(axis=0) == pytest.approx(circular_sums(rows).sum(axis=0))
    assert by_cluster[:, 1] == pytest.approx(np.ones(len(groups)))


@given(ROWS)
def test_a_cluster_drawn_twice_counts_twice_in_mme(pairs: list[tuple[int, float]]) -> None:
    rows = [{"category": "OCR", "image": str(image), "score": score} for image, score in pairs]
    sums = cluster_sums(mme_sums(rows), [row["image"] for row in rows])
    copies = [row | {"image": row["image"] + copy} for copy in ("", "again") for row in rows]
    points = mme_points(("OCR",))
    assert points(2 * sums.sum(axis=0)) == pytest.approx(points(mme_sums(copies).sum(axis=0)))


def test_a_metric_applies_where_every_row_has_what_it_needs() -> None:
    assert mean_of("accuracy").applies_to([{}])
    assert mean_of("validity", "valid", needs="valid").applies_to([{"valid": 1.0}, {"valid": 0.0}])
    assert not mean_of("validity", "valid", needs="valid").applies_to([{"valid": 1.0}, {}])


def test_mean_and_style() -> None:
    metric = mean_of("accuracy")
    assert metric.value([{"score": 1.0}, {"score": 0.5}]) == 0.75
    assert metric.style.text(0.75) == "75.00 %"
    assert Style(1.0, 4, "").text(1531.31868) == "1531.3187"
