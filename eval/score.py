"""Score an existing file of predictions; no model is needed.

    python -m eval.score --benchmark easy_vqa --predictions FILE --output DIR

FILE is JSON Lines with `id` and `text`, such as samples.jsonl of `eval.run` (its predictions.jsonl too, unless that
holds the answers of several models), or the answer file of LLaVA's evaluation scripts or of the official scorer.
Writes DIR/{samples.jsonl, results.json}. A file that misses samples is refused; with `--partial` it is scored without
headline number.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from defocus_mllm.console import run_script
from eval.files import read_json_lines, sha256_of_files
from eval.registry import Benchmark, get_benchmark
from eval.results import build_results, keep_complete, score_samples, summary, write_results, write_submission
from eval.samples import BenchmarkData, Prediction


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, score, write, print the summary."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--benchmark", required=True, metavar="NAME")
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="data in DIR/BENCHMARK instead of the default")
    parser.add_argument("--partial", action="store_true", help="accept a file that misses samples: no headline number")
    arguments = parser.parse_args(argv)
    scope = {"data_root": arguments.data_root, "partial": arguments.partial}
    print(score_file(arguments.benchmark, arguments.predictions, arguments.output, **scope))


def score_file(
    name: str, predictions_file: Path, output: Path, data_root: Path | None = None, partial: bool = False
) -> str:
    """Score a predictions file, write `output` and return the summary to print.

    A file that misses samples is an error, unless `partial` allows it; then there is no headline number.

    Raises:
        FileNotFoundError: predictions or data are missing.
        ValueError: unknown benchmark; malformed, repeated, unknown or missing predictions, named by file and line; a
            partial result would replace a complete one.
    """
    benchmark = get_benchmark(name)
    data = _load(benchmark, data_root, predictions_file)
    if benchmark.import_predictions is not None and not _has_ids(predictions_file):
        predictions = benchmark.import_predictions(predictions_file, data)
    else:
        predictions = read_predictions(predictions_file, {sample.id for sample in data.samples})
    if not partial:
        check_complete(predictions_file, data, predictions)
    rows = score_samples(benchmark, data.samples, predictions)
    model = {"name": None, "predictions": str(predictions_file), "predictions_sha": sha256_of_files([predictions_file])}
    results = build_results(benchmark, data, rows, model=model, generation=None, throughput=None)
    keep_complete(output, results["partial"])
    write_results(output, results, rows)
    write_submission(output, benchmark, data, predictions)
    return summary(results)


def _load(benchmark: Benchmark, data_root: Path | None, predictions_file: Path) -> BenchmarkData:
    """The official data or, where their files are absent, the truth in the predictions file, or a dataset's."""
    try:
        return benchmark.verified(benchmark.load(data_root))
    except FileNotFoundError:
        if benchmark.load_from_predictions is None:
            return benchmark.load_verified(data_root)
    try:
        return benchmark.verified(benchmark.load_from_predictions(predictions_file))
    except ValueError as no_truth:
        try:
            return benchmark.load_verified(data_root)
        except FileNotFoundError as no_data:
            raise no_truth from no_data


def _has_ids(path: Path) -> bool:
    """Whether a file has this project's own rows, with `id` and `text`, rather than an official or LLaVA layout."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "").strip()
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and "id" in row


def check_complete(path: Path, data: BenchmarkData, predictions: Mapping[str, Prediction]) -> None:
    """Raise ValueError, naming the first of them, if samples have no prediction."""
    missing = [sample.id for sample in data.samples if sample.id not in predictions]
    if missing:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{path}: {len(missing)} of {len(data.samples)} samples have no prediction ({named}): "
            "complete the file, or give --partial for a result without headline number"
        )


def read_predictions(path: Path, known_ids: set[str]) -> dict[str, Prediction]:
    """Read a predictions file; every id must be a sample of the benchmark and occur once."""
    predictions: dict[str, Prediction] = {}
    for number, row in enumerate(read_json_lines(path), 1):
        where = f"{path}, record {number}"
        prediction = Prediction.from_row(row, where)
        if prediction.id not in known_ids:
            raise ValueError(f"{where}: {prediction.id!r} is no sample of this benchmark")
        if prediction.id in predictions:
            raise ValueError(f"{where}: a second prediction for {prediction.id!r}: keep one (samples.jsonl has one)")
        predictions[prediction.id] = prediction
    return predictions


if __name__ == "__main__":
    run_script(main)
