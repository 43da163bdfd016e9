"""From predictions to results.json and samples.jsonl (schema version 1), and to the line a person reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from defocus_mllm.files import write_text_atomically
from eval.bootstrap import estimate
from eval.environment import describe_environment
from eval.files import json_line, read_json, sha256_of_json
from eval.likelihood import agreement, most_likely
from eval.measures import Metric, Style
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Prediction, Sample, labels_of

SCHEMA_VERSION = 1
_MOST_GROUPS_SHOWN = 20
_SECONDS_BEFORE_BAR = 2.0
_WHERE = ("name", "path", "revision", "predictions")


def score_samples(
    benchmark: Benchmark, samples: Sequence[Sample], predictions: Mapping[str, Prediction]
) -> list[dict[str, Any]]:
    """The rows of samples.jsonl: each sample that has a prediction, with its scores."""
    answered = [sample for sample in samples if sample.id in predictions]
    progress = _progress(answered, f"{benchmark.name}: scores", "sample")
    rows = [_score(benchmark, sample, predictions[sample.id]) for sample in progress]
    return score_rows_together(benchmark, rows)


def _progress(items: Sequence[Any], what: str, unit: str) -> tqdm[Any]:
    """The items with a bar, where they take long enough for somebody to wonder."""
    return tqdm(items, desc=what, unit=unit, delay=_SECONDS_BEFORE_BAR, leave=False)


def score_rows_together(benchmark: Benchmark, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the scores that depend on all of them; unchanged where the benchmark has none such."""
    if benchmark.score_together is None or not rows:
        return list(rows)
    return [{**row, **scores} for row, scores in zip(rows, benchmark.score_together(rows), strict=True)]


def _score(benchmark: Benchmark, sample: Sample, prediction: Prediction) -> dict[str, Any]:
    return {
        "id": sample.id,
        "cluster": sample.cluster,
        "images": list(sample.images),
        "question": sample.question,
        "prompt_sha": sha256_of_json(benchmark.prompt(sample))[:12],
        "target": sample.target,
        **{name: list(values) for name in ("answers", "choices") if (values := getattr(sample, name))},
        "text": prediction.text,
        **benchmark.judge(prediction.text, sample),
        "categories": dict(sample.categories),
        "n_in": prediction.n_in,
        "n_out": prediction.n_out,
        "secs": prediction.secs,
        "finish": prediction.finish,
        **_score_likelihood(benchmark, sample, prediction),
    }


def _score_likelihood(benchmark: Benchmark, sample: Sample, prediction: Prediction) -> dict[str, Any]:
    """The row's log-likelihoods, and under `likelihood` the judgement of the most likely option; empty without them."""
    if prediction.ll is None:
        return {}
    return {"ll": dict(prediction.ll), "likelihood": benchmark.judge(most_likely(prediction.ll), sample)}


def build_results(
    benchmark: Benchmark,
    data: BenchmarkData,
    rows: Sequence[dict[str, Any]],
    *,
    model: dict[str, Any],
    generation: dict[str, Any] | None,
    throughput: dict[str, Any] | None,
    limit: int | None = None,
    resumed: int = 0,
    failures: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of results.json.

    A run over fewer samples than the benchmark has is marked `"partial": true`; its numbers stand under
    `partial_metrics`, so that nothing that reads `metrics` can mistake them for a result.

    Raises:
        ValueError: there is not one prediction.
    """
    if not rows:
        raise ValueError(f"{benchmark.name}: no predictions to score")
    partial = len(rows) != benchmark.number_expected(data)
    metrics = _estimates(benchmark, rows)
    blocks = {
        "benchmark": _describe_benchmark(benchmark, data, len(rows), limit),
        "model": model,
        "protocol": {
            "mode": "generate",
            "prompt_id": benchmark.prompt_id,
            "prompt_sha": sha256_of_json([benchmark.prompt(sample) for sample in data.samples]),
            "parser": benchmark.parser,
            "gen": generation,
        },
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": _run_id(blocks),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "partial": partial,
        **blocks,
        "metrics": {} if partial else metrics,
        **({"partial_metrics": metrics} if partial else {}),
        **_likelihood(benchmark, rows, partial),
        "breakdown": {name: _breakdown(benchmark, rows, name) for name in benchmark.breakdowns},
        "health": _health(rows) | {"errors": len(failures or {}), "resumed": resumed},
        **({"errors": dict(failures)} if failures else {}),
        "throughput": throughput,
        "env": describe_environment(),
    }


def _describe_benchmark(benchmark: Benchmark, data: BenchmarkData, n: int, limit: int | None) -> dict[str, Any]:
    fingerprint = data.fingerprint()
    return {
        "name": benchmark.name,
        "split": benchmark.split,
        "version": benchmark.version,
        "n": n,
        "n_expected": benchmark.number_expected(data),
        "limit": limit,
        "fingerprint": fingerprint,
        "fingerprint_checked": fingerprint == benchmark.fingerprint,
        "origin": None if data.origin is None else {"name": str(data.origin), **asdict(data.origin)},
        "data_root": str(data.root),
        "image_root": str(data.image_root),
        "reference": benchmark.reference,
        "not_scored_here": benchmark.not_scored_here,
    }


def _run_id(blocks: dict[str, Any]) -> str:
    """Digest of what was measured and how; the same on another machine, where the same things lie in other folders."""
    places = ("data_root", "image_root", "origin")
    benchmark = {name: value for name, value in blocks["benchmark"].items() if name not in places}
    model = {name: value for name, value in blocks["model"].items() if name not in _WHERE}
    return sha256_of_json([benchmark, model, blocks["protocol"]])[:12]


def _estimates(benchmark: Benchmark, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        metric.name: _estimate(rows, metric, benchmark.cluster) | {"primary": metric.primary}
        for metric in _progress(benchmark.metrics, f"{benchmark.name}: intervals", "metric")
        if metric.applies_to(rows)
    }


def _likelihood(benchmark: Benchmark, rows: Sequence[dict[str, Any]], partial: bool) -> dict[str, Any]:
    """The block of likelihood scoring: the metrics of the most likely options, and how often generation says the same.

    Not the headline: published numbers are made by generation.
    """
    if not all("ll" in row for row in rows):
        return {}
    metrics = _estimates(benchmark, [{**row, **row["likelihood"]} for row in rows])
    return {"likelihood": {"agreement": agreement(rows), "partial_metrics" if partial else "metrics": metrics}}


def _estimate(rows: Sequence[dict[str, Any]], metric: Metric, cluster_name: str) -> dict[str, Any]:
    clusters = [row["cluster"] for row in rows]
    found = estimate(
        metric.summands(rows),
        clusters,
        metric.statistic,
        cluster_name,
        largest=metric.largest,
        is_centred=metric.is_centred,
    )
    return found | {"style": asdict(metric.style)}


def _breakdown(benchmark: Benchmark, rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The primary metric within each label of a category; a question counts under each of its labels."""
    primary = next(metric for metric in benchmark.metrics if metric.primary)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for label in labels_of(row["categories"][name]):
            groups.setdefault(label, []).append(row)
    return {
        label: {"n": len(group)} | _estimate(group, primary, benchmark.cluster)
        for label, group in _progress(sorted(groups.items()), f"{benchmark.name}: intervals by {name}", "group")
    }


def _health(rows: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """Counts of what may be wrong with answers; None: an imported file does not say how its answers ended."""
    knows_ends = any(row["finish"] is not None for row in rows)
    return {
        "unparsed": sum(row["parsed"] is None for row in rows),
        "unparsed_lenient": sum(row["parsed_lenient"] is None for row in rows),
        "truncated": sum(row["finish"] == "length" for row in rows) if knows_ends else None,
        "empty": sum(not row["text"].strip() for row in rows),
    }


def write_results(output: Path, results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write samples.jsonl, then results.json, each atomically: where results.json is, samples.jsonl is whole."""
    output.mkdir(parents=True, exist_ok=True)
    write_text_atomically(output / "samples.jsonl", "".join(json_line(row) for row in rows))
    write_text_atomically(output / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def write_submission(
    output: Path, benchmark: Benchmark, data: BenchmarkData, predictions: Mapping[str, Prediction]
) -> Path | None:
    """Write the file that the benchmark's test server or judge takes, and return its path; None where there is none.

    Servers refuse a file that misses a question, so a partial run writes none.
    """
    if benchmark.submission is None or len(predictions) != len(data.samples):
        return None
    path = output / benchmark.submission.file_name
    write_text_atomically(path, benchmark.submission.write(data, predictions))
    return path


def written(submission: Path | None) -> list[str]:
    """What the summary says about the file of `write_submission`."""
    return [] if submission is None else [f"written for its scorer: {submission}"]


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json of the schema version written here.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: malformed JSON, or another schema version; the message names the file.
    """
    results = read_json(path)
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version must be {SCHEMA_VERSION}, found {version!r}: evaluate again")
    return dict(results)


def keep_complete(output: Path, benchmark: Benchmark, partial: bool) -> None:
    """Raise ValueError if the result in `output` is another benchmark's, or a complete one that a partial replaces."""
    path = output / "results.json"
    if not path.is_file():
        return
    found = read_results(path)
    name, split = found["benchmark"]["name"], found["benchmark"]["split"]
    if (name, split) != (benchmark.name, benchmark.split):
        raise ValueError(f"{output}: holds the result of {name} {split}, which would be lost: give another --output")
    if partial and not found.get("partial"):
        raise ValueError(f"{output}: holds a complete result, which a partial one would replace: give another --output")


def summary(results: dict[str, Any]) -> str:
    """What the command prints: the headline number with its interval, or for a partial run that there is none.

    The last lines always tell how many answers could not be read, were cut or are missing, and what the data lack.
    """
    benchmark = results["benchmark"]
    title = f"{benchmark['name']} {benchmark['split']}"
    if results["partial"]:
        lines = [f"{title}: partial {benchmark['n']}/{benchmark['n_expected']}: no headline number"]
    elif not results["metrics"]:
        why = benchmark.get("not_scored_here") or "not scored here"
        lines = [f"{title}: {benchmark['n']:,} answers, {why}, see {benchmark['reference']}"]
    else:
        lines = _describe_metrics(results, title)
    return "\n  ".join([*lines, describe_health(results["health"]), *describe_data(benchmark)])


def describe_health(health: Mapping[str, int | None]) -> str:
    """The counts of the `health` block in one line."""
    return ", ".join(f"{name} {'unknown' if count is None else f'{count:,}'}" for name, count in health.items())


def _describe_metrics(results: dict[str, Any], title: str) -> list[str]:
    """The primary metric, that of the likelihoods, all others, and the groups of each breakdown."""
    metrics, breakdowns = results["metrics"], results["breakdown"]
    primary = next(name for name, metric in metrics.items() if metric["primary"])
    lines = [f"{title}: {primary} {format_estimate(metrics[primary])}, {results['benchmark']['n']:,} samples"]
    if "likelihood" in results:
        lines.append(_likelihood_summary(results["likelihood"], primary))
    lines += [f"{name} {format_estimate(metric)}" for name, metric in metrics.items() if not metric["primary"]]
    for name, groups in breakdowns.items():
        if len(groups) > _MOST_GROUPS_SHOWN:
            lines.append(f"by {name}: {len(groups)} groups, in results.json")
            continue
        lines += [f"by {name}:"] if len(breakdowns) > 1 else []
        indent = "  " if len(breakdowns) > 1 else ""
        lines += [
            f"{indent}{label}: {format_estimate(group)}, {group['n']:,} samples" for label, group in groups.items()
        ]
    return lines


def describe_data(benchmark: Mapping[str, Any]) -> list[str]:
    """What a reader must know about data that are not the official files, or not proved to hold the same."""
    origin = benchmark.get("origin")
    lines = [f"data: {origin['name']}" + (f": {origin['differs']}" if origin["differs"] else "")] if origin else []
    if not benchmark["fingerprint_checked"]:
        lines.append("the data were counted, but no official fingerprint confirms them")
    return lines


def _likelihood_summary(block: dict[str, Any], primary: str) -> str:
    value = format_estimate(block["metrics"][primary])
    return f"by likelihood of the options: {primary} {value}; generation agrees in {100 * block['agreement']:.1f} %"


def format_estimate(metric: dict[str, Any]) -> str:
    """A value with its interval, if there are any, in the metric's own unit and number of digits."""
    style = Style(**metric["style"])
    if metric["value"] is None:
        return "not defined here"
    if metric["ci95"] is None:
        return f"{style.text(metric['value'])} (no interval: one {metric['cluster']} only)"
    low, high = (style.number(bound) for bound in metric["ci95"])
    return f"{style.text(metric['value'])} (95 % interval {low} to {high})"
