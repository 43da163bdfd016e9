"""GQA's scores besides accuracy, on hand-written questions; each number was worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from eval.measures import Metric
from eval.metrics.gqa import (
    consistency,
    consistency_sums,
    distribution,
    distribution_counts,
    is_among,
    number_of_steps,
)

DISTRIBUTION = Metric("distribution", distribution_counts, distribution)
CONSISTENCY = Metric("consistency", consistency_sums, consistency)


def answer(group: str | None, target: str, text: str) -> dict[str, Any]:
    return {"group": group, "target": target, "text": text}


def test_distribution_averages_chi_square_over_groups_by_their_questions() -> None:
    colours = [answer("color", "red", "Red."), answer("color", "red", "blue"), answer("color", "red", "blue")]
    colours += [answer("color", "blue", "violet")]
    places = [answer("place", "left", "left"), answer("place", "left", "right")]
    # color: red 3 true, 1 said; blue 1 true, 2 said: 4/3 + 1; violet is true of nothing. place: left 2, 1: 1/2.
    expected = ((4 / 3 + 1) * 4 + 0.5 * 2) / 6 / 100
    assert DISTRIBUTION.value([*colours, *places]) == pytest.approx(expected)
    assert DISTRIBUTION.value([*colours, *places, answer(None, "yes", "no")]) == pytest.approx(expected)
    assert DISTRIBUTION.value([answer(None, "yes", "no")]) == 0
    assert DISTRIBUTION.value([answer("color", "red", "red")]) == 0


def test_consistency_averages_over_right_answers_that_entail_others() -> None:
    scores = {"a": 1, "b": 0, "c": 1, "d": 1}
    entailed = {"a": ["b", "c"], "b": ["a"], "c": [], "d": ["c"]}
    rows = [{"id": name, "score": score, "entailed": entailed[name]} for name, score in scores.items()]
    assert CONSISTENCY.value(rows) == pytest.approx((0.5 + 1) / 2)
    assert CONSISTENCY.value(rows[1:3]) == 0
    assert CONSISTENCY.value([*rows[:1], *rows[2:]]) == 1  # b was not answered: it is neither right nor wrong


def test_choices_after_conversion_and_what_things_have_in_common() -> None:
    assert is_among("Red..", ["red"], "queryAttr")
    assert not is_among(" red", ["red"], "queryAttr")
    assert not is_among("red", ["blue"], "queryAttr")
    assert is_among("Color", ["red"], "twoCommon")
    assert not is_among("red", ["red"], "twoCommon")


def test_last_operations_are_no_steps() -> None:
    operations = [("select", "dog (1)"), ("filter color", "red"), ("relate", "cat, left (2)"), ("query", "name")]
    semantic = [{"operation": operation, "argument": argument} for operation, argument in operations]
    assert number_of_steps(semantic) == 3
    assert number_of_steps([*semantic[:1], {"operation": "exist", "argument": "?"}]) == 1
    assert number_of_steps([*semantic[:1], {"operation": "choose name", "argument": "a|b"}]) == 1
    assert number_of_steps([*semantic[:1], {"operation": "query", "argument": "color"}]) == 2
