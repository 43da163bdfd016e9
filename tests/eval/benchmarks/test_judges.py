"""What benchmarks make of answers and of their sums: official quirks, what is not asked, full marks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eval.bootstrap import estimate
from eval.compare import _compare_metric, _describe_metric
from eval.measures import Metric
from eval.metrics.gqa import distribution, distribution_counts, is_among
from eval.metrics.yes_no import PERCEPTION
from eval.registry import get_benchmark
from eval.results import _estimate, format_estimate
from eval.samples import Sample


def rows_of(name: str, samples: list[Sample], answer: str = "Yes") -> list[dict[str, Any]]:
    judge = get_benchmark(name).judge
    return [
        {"cluster": sample.cluster, "categories": dict(sample.categories), "target": sample.target}
        | judge(answer, sample)
        for sample in samples
    ]


def metric(name: str, which: str) -> Metric:
    return next(each for each in get_benchmark(name).metrics if each.name == which)


@pytest.mark.parametrize(("answer", "score"), [("Yes.", 1), (" yes", 0), ("yes ", 0), ("yes\n", 0)])
def test_gqa_counts_white_space_as_its_script_does(answer: str, score: float) -> None:
    assert get_benchmark("gqa").judge(answer, Sample("1", (), "?", "yes", "i"))["score"] == score


@pytest.mark.parametrize("name", ["chartqa", "docvqa", "docvqa_test", "gqa", "mm_vet", "mmmu", "vqav2"])
def test_nothing_but_white_space_is_no_answer(name: str) -> None:
    question = Sample("1", (), "?", "5", "i", {"question_type": "open"}, answers=("5",) * 10)
    judge = get_benchmark(name).judge
    for text, read in ((" \n", None), (" 5\n", "5")):
        assert (judge(text, question)["parsed"], judge(text, question)["parsed_lenient"]) == (read, read)


def test_a_sampling_of_pope_without_questions_has_no_score() -> None:
    rows = rows_of("pope", [Sample(f"{n}", (), "?", "yes", f"{n}", {"category": "popular"}) for n in range(30)])
    assert format_estimate(_estimate(rows, metric("pope", "popular_f1"), "image")).startswith("1.000000 (95 %")
    assert _estimate(rows[:1], metric("pope", "popular_accuracy"), "image")["ci95"] == [
        pytest.approx(0.2065, abs=1e-4),
        1,
    ]
    missing = _estimate(rows, metric("pope", "random_f1"), "image")
    assert json.dumps(missing, allow_nan=False)
    assert format_estimate(missing) == "not defined here"
    comparison = _compare_metric(metric("pope", "random_f1"), rows, rows, "image")
    assert json.dumps(comparison, allow_nan=False)
    assert _describe_metric(comparison) == "not defined here"
    assert metric("pope", "f1").value(rows) == 1, "the mean of the samplings that were asked"


def test_full_marks_in_mme_are_not_certainty() -> None:
    samples = [
        Sample(f"{name}{n}{q}", (), "?", "yes", f"{name}/{n}", {"category": name})
        for name in PERCEPTION
        for n in range(20)
        for q in "ab"
    ]
    rows = rows_of("mme", samples)
    for name, most, images in (("perception", 2000, 200), ("OCR", 200, 20)):
        found = _estimate(rows, metric("mme", name), "image")
        assert (found["value"], found["method"], found["ci95"][1]) == (most, "wilson", most)
        assert found["ci95"][0] == pytest.approx(most * images / (images + 1.96**2), rel=1e-3)


def test_one_image_without_bounds_has_no_interval() -> None:
    def difference(sums: Any) -> Any:
        return sums[..., 0] - sums[..., 1]

    one = estimate([[1.0, 0.5]], ["a"], difference, largest=None)
    printed = format_estimate(one | {"style": {"scale": 1.0, "digits": 1, "unit": ""}})
    assert printed == "0.5 (no interval: one image only)"


def test_gqa_scores_besides_accuracy_count_white_space_too() -> None:
    assert is_among("Red.", ["red"], "")
    assert not is_among("red ", ["red"], "")
    rows = [{"group": "g", "target": "red", "text": text} for text in ("Red.", "red", " red")]
    assert distribution(distribution_counts(rows).sum(axis=0)) == pytest.approx((3 - 2) ** 2 / 3 / 100)
