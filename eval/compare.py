"""Compare two evaluations of one benchmark, question by question.

    python -m eval.compare outputs/a/eval/easy_vqa outputs/b/eval/easy_vqa
    python -m eval.compare A B --output comparison.json

Each folder holds results.json and samples.jsonl. For every metric: the difference, B minus A, with a 95 % interval by a
bootstrap that draws the same clusters for both (most of the spread between questions cancels); for right-or-wrong
scores McNemar's exact test too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from defocus_mllm.console import run_script
from defocus_mllm.files import write_text_atomically
from eval.bootstrap import estimate
from eval.files import read_json_lines
from eval.measures import Metric, Style
from eval.registry import get_benchmark
from eval.results import read_results

Rows = Sequence[Mapping[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, compare, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A", help="folder with results.json and samples.jsonl")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the comparison as JSON")
    arguments = parser.parse_args(argv)
    comparison = compare_folders(arguments.a, arguments.b)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(arguments.output, json.dumps(comparison, indent=2, ensure_ascii=False) + "\n")
    print(describe(comparison))


def compare_folders(a: Path, b: Path) -> dict[str, Any]:
    """Compare two results on the questions that both answered; how many only one answered is counted.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: they measure different benchmarks, splits or data, nothing can be scored, or share no question.
    """
    results = [read_results(folder / "results.json") for folder in (a, b)]
    rows = [{row["id"]: row for row in read_json_lines(folder / "samples.jsonl")} for folder in (a, b)]
    for field in ("name", "split", "fingerprint"):
        found = [result["benchmark"][field] for result in results]
        if found[0] != found[1]:
            raise ValueError(f"{a} and {b} are not comparable: benchmark.{field} is {found[0]!r} and {found[1]!r}")
    benchmark = get_benchmark(results[0]["benchmark"]["name"])
    if not benchmark.metrics:
        raise ValueError(f"{benchmark.name}: {benchmark.not_scored_here}; there is nothing to compare")
    common = [name for name in rows[0] if name in rows[1]]
    if not common:
        raise ValueError(f"{a} and {b} have no question in common")
    rows_a, rows_b = ([of[name] for name in common] for of in rows)
    return {
        "benchmark": benchmark.name,
        "a": str(a),
        "b": str(b),
        "n": len(common),
        "n_expected": benchmark.n_expected,
        "only_a": len(rows[0]) - len(common),
        "only_b": len(rows[1]) - len(common),
        "metrics": {
            metric.name: _compare_metric(metric, rows_a, rows_b, benchmark.cluster)
            for metric in benchmark.metrics
            if metric.applies_to(rows_a) and metric.applies_to(rows_b)
        },
        "mcnemar": mcnemar([row["score"] for row in rows_a], [row["score"] for row in rows_b]),
    }


def _compare_metric(metric: Metric, rows_a: Rows, rows_b: Rows, cluster_name: str) -> dict[str, Any]:
    clusters = [row["cluster"] for row in rows_a]
    difference = paired_difference(metric, rows_a, rows_b, clusters, cluster_name)
    found = {"a": metric.value(rows_a), "b": metric.value(rows_b)}
    values = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return values | {"difference": difference, "style": asdict(metric.style), "primary": metric.primary}


def paired_difference(
    metric: Metric, rows_a: Rows, rows_b: Rows, clusters: Sequence[str], cluster_name: str = "image"
) -> dict[str, Any]:
    """Estimate of value(b) - value(a); row by row both are about the same question, and clusters are drawn for both."""
    summands_a, summands_b = metric.summands(rows_a), metric.summands(rows_b)
    width = summands_a.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return metric.statistic(sums[..., width:]) - metric.statistic(sums[..., :width])

    both = np.hstack([summands_a, summands_b])
    return estimate(both, clusters, difference, cluster_name, largest=None, is_centred=metric.is_centred)


def mcnemar(scores_a: Sequence[float], scores_b: Sequence[float]) -> dict[str, Any] | None:
    """McNemar's exact test (two-sided) on the questions that exactly one of two models gets right.

    None where some score is neither 0 nor 1: the test is about right and wrong. It takes questions for independent,
    which the interval of `paired_difference` does not.
    """
    if not set(scores_a) | set(scores_b) <= {0, 1}:
        return None
    only_a = sum(a > b for a, b in zip(scores_a, scores_b, strict=True))
    only_b = sum(a < b for a, b in zip(scores_a, scores_b, strict=True))
    return {"only_a_right": only_a, "only_b_right": only_b, "p": exact_binomial_p(only_a, only_b)}


def exact_binomial_p(first: int, second: int) -> float:
    """Probability that a fair coin splits first + second tosses at least as unevenly as (first, second)."""
    tosses = first + second
    ways = total = 1
    for heads in range(min(first, second)):
        ways = ways * (tosses - heads) // (heads + 1)
        total += ways
    return min(1.0, 2 * total / 2**tosses)


def describe(comparison: Mapping[str, Any]) -> str:
    """What the command prints."""
    lines = [f"{comparison['benchmark']}: B minus A on {comparison['n']:,} questions"]
    lines += [f"  A: {comparison['a']}", f"  B: {comparison['b']}"]
    if comparison["only_a"] or comparison["only_b"]:
        lines.append(f"  left out: {comparison['only_a']} only in A, {comparison['only_b']} only in B")
    if comparison["n"] != comparison["n_expected"]:
        lines.append(f"  a part of the benchmark: {comparison['n']}/{comparison['n_expected']}")
    lines += [f"  {name}: {_describe_metric(metric)}" for name, metric in comparison["metrics"].items()]
    test = comparison["mcnemar"]
    if test is None:
        lines.append("  McNemar's test: not for scores between 0 and 1")
    else:
        counts = f"only A right {test['only_a_right']}, only B right {test['only_b_right']}"
        lines.append(f"  McNemar's exact test: {counts}, p = {test['p']:.3g}")
    return "\n".join(lines)


def _describe_metric(metric: Mapping[str, Any]) -> str:
    style, difference = Style(**metric["style"]), metric["difference"]
    if difference["value"] is None:
        return "not defined here"
    if difference["ci95"] is None:
        return f"{style.text(metric['a'])} -> {style.text(metric['b'])} (no interval: one {difference['cluster']} only)"
    value, low, high = (
        f"{style.scale * number:+.{style.digits}f}" for number in (difference["value"], *difference["ci95"])
    )
    return f"{style.text(metric['a'])} -> {style.text(metric['b'])}: {value} (95 % interval {low} to {high})"


if __name__ == "__main__":
    run_script(main)
