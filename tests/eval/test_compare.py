"""Paired comparison: the shared part cancels, exact p-values, and only like is compared with like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.compare import compare_folders, describe, exact_binomial_p, main, mcnemar, paired_difference
from eval.measures import Metric, mean_of
from eval.registry import Benchmark
from eval.run import evaluate
from tests.eval.fake_generator import FakeGenerator


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (5, 0), (3, 9), (9, 3), (40, 41), (310, 265)])
def test_exact_p_is_the_binomial_tests(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert exact_binomial_p(first, second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_counts_only_what_one_gets_right() -> None:
    assert mcnemar([1, 1, 0, 0, 1], [1, 0, 1, 0, 0]) == {"only_a_right": 2, "only_b_right": 1, "p": 1.0}
    assert mcnemar([1.0, 0.3], [1.0, 0.0]) is None


def rows_of(scores: np.ndarray) -> list[dict]:
    return [{"score": float(score)} for score in scores]


def test_pairing_cancels_what_both_share() -> None:
    generator = np.random.default_rng(0)
    a = generator.integers(0, 2, 600).astype(float)
    b = np.where(generator.random(600) < 0.05, 1 - a, a)
    clusters = [str(index // 3) for index in range(600)]
    metric = mean_of("accuracy")
    paired = paired_difference(metric, rows_of(a), rows_of(b), clusters)
    assert paired["value"] == pytest.approx(b.mean() - a.mean())
    assert paired["se"] == pytest.approx((b - a).std() / np.sqrt(600), rel=0.15), "not 0.029, the unpaired error"


def test_a_ratio_is_compared_as_a_ratio() -> None:
    def summands(rows: list) -> np.ndarray:
        return np.array([[row["hit"], row["said"]] for row in rows], float)

    metric = Metric("precision", summands)
    a = [{"hit": hit, "said": 1} for hit in (1, 0, 1, 0)] * 40
    b = [{"hit": hit, "said": said} for hit, said in ((1, 1), (0, 0), (1, 1), (0, 1))] * 40
    assert paired_difference(metric, a, b, list(map(str, range(160))))["value"] == pytest.approx(2 / 3 - 1 / 2)


@pytest.fixture
def folders(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        evaluate(benchmark, FakeGenerator(f"model-{name}"), tmp_path / name, data_root)
    return tmp_path / "a" / "easy_vqa", tmp_path / "b" / "easy_vqa"


def test_command_compares_two_evaluations(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folders
    output = a.parent / "comparison.json"
    main([str(a), str(b), "--output", str(output)])
    printed = capsys.readouterr().out
    comparison = json.loads(output.read_text())
    scores = [[json.loads(row)["score"] for row in (f / "samples.jsonl").read_text().splitlines()] for f in folders]
    accuracy = comparison["metrics"]["accuracy"]
    assert accuracy["a"] == pytest.approx(np.mean(scores[0]))
    assert accuracy["difference"]["value"] == pytest.approx(np.mean(scores[1]) - np.mean(scores[0]))
    assert comparison["mcnemar"]["only_a_right"] == sum(x > y for x, y in zip(*scores, strict=True)) > 0
    assert "  accuracy: " in printed
    assert "McNemar's exact test: only A right" in printed
    assert "a part of the benchmark: 60/9673" in printed


def test_a_result_against_itself_differs_by_nothing(folders: tuple[Path, Path]) -> None:
    comparison = compare_folders(folders[0], folders[0])
    assert comparison["metrics"]["accuracy"]["difference"]["ci95"] == [0, 0]
    assert comparison["mcnemar"]["p"] == 1


def test_questions_of_one_side_are_counted_and_left_out(folders: tuple[Path, Path]) -> None:
    a, b = folders
    lines = (b / "samples.jsonl").read_text().splitlines(keepends=True)
    (b / "samples.jsonl").write_text("".join(lines[5:]))
    comparison = compare_folders(a, b)
    assert (comparison["n"], comparison["only_a"], comparison["only_b"]) == (55, 5, 0)
    assert "left out: 5 only in A, 0 only in B" in describe(comparison)


def test_other_data_are_refused(folders: tuple[Path, Path]) -> None:
    a, b = folders
    results = json.loads((b / "results.json").read_text())
    results["benchmark"]["fingerprint"] = "other"
    (b / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"not comparable: benchmark\.fingerprint is '\w+' and 'other'"):
        compare_folders(a, b)
