"""Average precision and F1 of saying that a question cannot be answered, against the definition with thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics.answerability import average_precision, unanswerable_counts


def by_definition(truth: list[bool], said: list[bool]) -> float:
    """Sum over thresholds, from the highest, of (gain of recall) x precision."""
    area = recall = 0.0
    for threshold in (1, 0):
        taken = [right for right, answer in zip(truth, said, strict=True) if answer >= threshold]
        if taken and any(truth):
            area += (sum(taken) / sum(truth) - recall) * sum(taken) / len(taken)
            recall = sum(taken) / sum(truth)
    return area


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_average_precision_is_that_of_two_thresholds(pairs: list[tuple[bool, bool]]) -> None:
    rows = [{"unanswerable": truth, "said_unanswerable": said} for truth, said in pairs]
    truth, said = [list(side) for side in zip(*pairs, strict=True)]
    found = average_precision(unanswerable_counts(rows).sum(axis=0))
    assert float(found) == pytest.approx(by_definition(truth, said), abs=1e-12)


def test_counts_and_resamples() -> None:
    pairs = [(True, True), (True, False), (False, False), (False, True)]
    counts = unanswerable_counts([{"said_unanswerable": said, "unanswerable": truth} for said, truth in pairs])
    assert (counts == np.eye(4)).all()
    draws = np.array([[2, 1, 3, 2], [0, 0, 5, 3], [0, 2, 6, 0]])
    expected = [0.5 * 2 / 3 + 0.5 * 4 / 8, 3 / 8, 0]
    assert average_precision(draws) == pytest.approx(expected)
