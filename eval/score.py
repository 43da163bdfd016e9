"""Score an existing file of predictions; no model is needed.

    python -m eval.score --benchmark easy_vqa --predictions FILE --output DIR

FILE is JSON Lines with `id` and `text`, such as samples.jsonl of `eval.run` (its predictions.jsonl too, unless that
holds the answers of several models), or answers as LLaVA's evaluation scripts write them or the official scorer takes
them: one file, several, or a folder of them (docs/evaluation.md lists the formats of each benchmark).
Writes DIR/{samples.jsonl, results.json}. A file that misses samples is refused; with `--partial` it is scored without
headline number.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from defocus_mllm.console import run_script
from eval.answer_files import OWN, AnswerFile, Imported, read_answers
from eval.files import first_of, sha256_of_files, shown
from eval.layouts import check_data_root
from eval.registry import Benchmark, get_benchmark
from eval.results import build_results, keep_complete, score_samples, summary, write_results, write_submission, written
from eval.samples import BenchmarkData, Prediction


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, score, write, print the summary."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--benchmark", required=True, metavar="NAME")
    parser.add_argument("--predictions", required=True, type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="data in DIR/BENCHMARK instead of the default")
    parser.add_argument("--partial", action="store_true", help="accept a file that misses samples: no headline number")
    arguments = parser.parse_args(argv)
    check_data_root(arguments.data_root)
    scope = {"data_root": arguments.data_root, "partial": arguments.partial}
    print(score_file(arguments.benchmark, arguments.predictions, arguments.output, **scope))


def score_file(
    name: str,
    predictions: Path | Sequence[Path],
    output: Path,
    data_root: Path | None = None,
    partial: bool = False,
) -> str:
    """Score a file, several, or a folder of predictions, write `output` and return the summary to print.

    Predictions that miss samples are an error, unless `partial` allows it; then there is no headline number.

    Raises:
        FileNotFoundError: predictions or data are missing.
        ValueError: unknown benchmark; malformed, repeated, unknown or missing predictions, named by file and record; a
            partial result would replace a complete one.
    """
    benchmark = get_benchmark(name)
    answers = read_answers(*([predictions] if isinstance(predictions, Path) else predictions))
    data = _load(benchmark, data_root, answers)
    imported = match(benchmark, answers, data)
    if not partial:
        check_complete(answers.name, data, imported.predictions)
    rows = score_samples(benchmark, data.samples, imported.predictions)
    model = {
        "name": imported.model,
        "predictions": answers.name,
        "predictions_sha": sha256_of_files(answers.files),
        "predictions_format": f"{imported.format}, {answers.container}",
        "predictions_left_out": dict(imported.left_out),
    }
    results = build_results(benchmark, data, rows, model=model, generation=None, throughput=None)
    keep_complete(output, benchmark, results["partial"])
    write_results(output, results, rows)
    submission = written(write_submission(output, benchmark, data, imported.predictions))
    return "\n  ".join([summary(results), *submission, _describe(answers, imported)])


def _describe(answers: AnswerFile, imported: Imported) -> str:
    left_out = "".join(f"; left out: {count:,} {reason}" for reason, count in imported.left_out.items())
    return f"read as {imported.format}, {answers.container}: {len(imported.predictions):,} answers{left_out}"


def _load(benchmark: Benchmark, data_root: Path | None, answers: AnswerFile) -> BenchmarkData:
    """The official data or, where their files are absent, the truth that stands in the predictions, or a dataset's."""
    try:
        return benchmark.verified(benchmark.load(data_root))
    except FileNotFoundError:
        if benchmark.load_from_predictions is None:
            return benchmark.load_verified(data_root)
    try:
        return benchmark.verified(benchmark.load_from_predictions(answers))
    except ValueError as no_truth:
        try:
            return benchmark.load_verified(data_root)
        except FileNotFoundError as no_data:
            raise ValueError(f"{no_data}; nor do the answers hold the truth: {no_truth}") from no_truth


def match(benchmark: Benchmark, answers: AnswerFile, data: BenchmarkData) -> Imported:
    """Predictions by sample id, from this project's own rows, with `id` and `text`, or an official or LLaVA layout."""
    if {OWN.id_field, OWN.text_field} <= set(answers.rows[0].values) or benchmark.import_predictions is None:
        return match_own(answers, {sample.id for sample in data.samples})
    return benchmark.import_predictions(answers, data)


def check_complete(name: str, data: BenchmarkData, predictions: Mapping[str, Prediction]) -> None:
    """Raise ValueError, naming the first of them, if samples have no prediction."""
    missing = [sample.id for sample in data.samples if sample.id not in predictions]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(data.samples)} samples have no prediction ({first_of(missing)}): "
            "complete the file, or give --partial for a result without headline number"
        )


def match_own(answers: AnswerFile, known_ids: set[str]) -> Imported:
    """Predictions of the rows that `eval.run` writes; every id must be a sample of the benchmark and occur once."""
    predictions: dict[str, Prediction] = {}
    for row in answers.rows:
        prediction = Prediction.from_row(row.values, row.where)
        if prediction.id not in known_ids:
            raise ValueError(f"{row.where}: {shown(prediction.id)} is no sample of this benchmark")
        if prediction.id in predictions:
            raise ValueError(
                f"{row.where}: a second prediction for {prediction.id!r}: keep one (samples.jsonl has one)"
            )
        predictions[prediction.id] = prediction
    return Imported(predictions, str(OWN))


if __name__ == "__main__":
    run_script(main)
