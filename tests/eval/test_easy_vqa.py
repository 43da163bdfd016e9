"""The official data, its checks, and the scoring rule."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from eval.benchmarks.easy_vqa import BENCHMARK, parse
from eval.metrics.exact_match import exact_match, lenient_exact_match
from eval.registry import Benchmark, benchmark_names, get_benchmark


def questions_file(data_root: Path) -> Path:
    return data_root / "easy_vqa" / "test" / "questions.json"


def test_installed_package_is_the_official_split() -> None:
    data = BENCHMARK.load_verified(None)
    assert len(data.samples) == 9673
    assert len({sample.cluster for sample in data.samples}) == 1000
    types = Counter(sample.categories["answer_type"] for sample in data.samples)
    assert types == {"yes/no": 7136, "colour": 1280, "shape": 1257}
    assert all((data.root / sample.images[0]).is_file() for sample in data.samples)


def test_every_benchmark_is_complete() -> None:
    for name in benchmark_names():
        benchmark = get_benchmark(name)
        assert benchmark.name == name
        if benchmark.metrics:
            assert benchmark.primary_metric in {metric.name for metric in benchmark.metrics}
        else:
            assert benchmark.submission is not None
        assert benchmark.reference.startswith("https://")


def test_one_changed_answer_changes_the_fingerprint(benchmark: Benchmark, data_root: Path) -> None:
    benchmark.load_verified(data_root)
    records = json.loads(questions_file(data_root).read_text())
    records[3][1] = "yes"
    questions_file(data_root).write_text(json.dumps(records))
    with pytest.raises(ValueError, match="not the official test split of easy_vqa: 60 samples"):
        benchmark.load_verified(data_root)


def test_too_few_samples_are_refused(benchmark: Benchmark, data_root: Path) -> None:
    records = json.loads(questions_file(data_root).read_text())
    questions_file(data_root).write_text(json.dumps(records[:-1]))
    with pytest.raises(ValueError, match=r"59 samples \(expected 60\).*pip install easy-vqa"):
        benchmark.load_verified(data_root)


def test_shared_identifiers_are_refused(benchmark: Benchmark, data_root: Path) -> None:
    data = benchmark.load(data_root)
    twice = dataclasses.replace(data, samples=(*data.samples[:-1], data.samples[0]))
    with pytest.raises(ValueError, match="share an identifier"):
        benchmark.verified(twice)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[["a?", "yes", 1],\n oops]', r"questions\.json, line 2, column 2: malformed JSON"),
        ('[["a?", "yes", 1], ["b?", "perhaps", 1]]', r"questions\.json\[1\]: .*'perhaps'"),
        ('[["a?", "yes"]]', r"questions\.json\[0\]: expected \[question"),
        ('{"a": 1}', r"questions\.json: expected a list"),
    ],
)
def test_malformed_data_are_named(data_root: Path, content: str, message: str) -> None:
    questions_file(data_root).write_text(content)
    with pytest.raises(ValueError, match=message):
        BENCHMARK.load(data_root)


def test_missing_data_name_the_expected_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"easy_vqa/test/questions\.json: no such file: pip install"):
        BENCHMARK.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "official", "lenient", "parsed"),
    [
        ("yes", 1, 1, "yes"),
        (" yes\n", 1, 1, "yes"),
        ("Yes", 0, 1, None),
        ("yes.", 0, 1, None),
        ("yes yes", 0, 0, None),
        ("no", 0, 0, "no"),
        ("", 0, 0, None),
    ],
)
def test_scoring_rule(text: str, official: float, lenient: float, parsed: str | None) -> None:
    assert exact_match(text, "yes") == official
    assert lenient_exact_match(text, "yes") == lenient
    assert parse(text) == parsed
