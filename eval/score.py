"""Score an existing file of predictions; no model is needed.

    python -m eval.score --benchmark easy_vqa --predictions FILE --output DIR

FILE is JSON Lines with `id` and `text`, such as samples.jsonl of `eval.run` (its predictions.jsonl too, unless that
holds the answers of several models).
Writes DIR/{samples.jsonl, results.json}. A file that does not cover the benchmark gets no headline number.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from defocus_mllm.console import run_script
from eval.files import read_json_lines, sha256_of_files
from eval.registry import get_benchmark
from eval.results import build_results, keep_complete, score_samples, summary, write_results
from eval.samples import Prediction


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, score, write, print the summary."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--benchmark", required=True, metavar="NAME")
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="data in DIR/BENCHMARK instead of the default")
    arguments = parser.parse_args(argv)
    print(score_file(arguments.benchmark, arguments.predictions, arguments.output, arguments.data_root))


def score_file(name: str, predictions_file: Path, output: Path, data_root: Path | None = None) -> str:
    """Score a predictions file, write `output` and return the summary to print.

    Raises:
        FileNotFoundError: predictions or data are missing.
        ValueError: unknown benchmark; malformed, repeated or unknown predictions, named by file and line; a partial
            result would replace a complete one.
    """
    benchmark = get_benchmark(name)
    data = benchmark.load_verified(data_root)
    predictions = read_predictions(predictions_file, {sample.id for sample in data.samples})
    rows = score_samples(benchmark, data.samples, predictions)
    model = {"name": None, "predictions": str(predictions_file), "predictions_sha": sha256_of_files([predictions_file])}
    results = build_results(benchmark, data, rows, model=model, generation=None, throughput=None)
    keep_complete(output, results["partial"])
    write_results(output, results, rows)
    return summary(results)


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
