"""`eval.throughput` measures both ways and sees whether their answers are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from eval.generator import Request
from eval.registry import Benchmark
from eval.samples import Prediction
from eval.throughput import measure
from tests.eval.fake_generator import SlowGenerator


class Muddled(SlowGenerator):
    """Gives another answer in a batch than alone."""

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        predictions = super().generate(requests, max_new_tokens)
        return [replace(p, text="other") for p in predictions] if len(requests) > 2 else predictions


@pytest.mark.parametrize(("kind", "same"), [(SlowGenerator, 10), (Muddled, 0)])
def test_both_ways_are_measured(benchmark: Benchmark, data_root: Path, kind: type[SlowGenerator], same: int) -> None:
    record = measure(benchmark, benchmark.load(data_root), kind(0.02), questions=60, singles=10, rounds=1)
    assert record["ratio"] == pytest.approx(record["batched_per_s"] / record["single_per_s"])
    assert record["ratio"] > 4, "a batch takes as long as a question"
    assert record["single_per_s"] < 50
    assert record["same_answers"] == same
