"""Generate answers to benchmarks and score them.

    python -m eval.run --list
    python -m eval.run --model outputs/quickstart/stage2 --benchmarks easy_vqa --output outputs/quickstart/eval

Writes OUTPUT/BENCHMARK/{predictions.jsonl, samples.jsonl, results.json}. Interrupted, even by kill -9, the same command
resumes. `--limit N` asks only the first N questions; such a run prints no headline number.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from defocus_mllm.console import run_script
from eval.environment import peak_memory_gb
from eval.generator import Generator, TransformersGenerator
from eval.registry import Benchmark, benchmark_names, get_benchmark
from eval.results import build_results, keep_complete, score_samples, summary, write_results, write_submission
from eval.runner import generate_answers

DEFAULT_BATCH_SIZE = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, then evaluate each benchmark in turn."""
    parser = _argument_parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(describe_benchmark(get_benchmark(name)) for name in benchmark_names()))
        return
    missing = [f"--{name}" for name in ("model", "benchmarks", "output") if getattr(arguments, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    benchmarks = [get_benchmark(name) for name in arguments.benchmarks.split(",")]
    generator = TransformersGenerator(arguments.model, arguments.device)
    scope = {"data_root": arguments.data_root, "limit": arguments.limit, "batch_size": arguments.batch_size}
    for benchmark in benchmarks:
        print(evaluate(benchmark, generator, arguments.output, **scope))


def evaluate(
    benchmark: Benchmark,
    generator: Generator,
    output: Path,
    data_root: Path | None = None,
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> str:
    """Evaluate a model on one benchmark, write `output`/BENCHMARK and return the summary to print.

    Raises:
        FileNotFoundError, ValueError: data or images missing, malformed or not the official ones; `limit` would replace
            a complete result by a partial one.
    """
    folder = output / benchmark.name
    data = benchmark.load_verified(data_root)
    samples = data.samples[:limit]
    result, journal = folder / "results.json", folder / "predictions.jsonl"
    keep_complete(folder, partial=len(samples) < len(data.samples))
    # While predictions are being made, no result of an earlier model may stand beside them.
    answers = generate_answers(benchmark, data.root, samples, generator, journal, batch_size, outdated=result)
    if answers.other_keys:
        print(
            f"{journal}: {answers.other_keys} predictions made with another model, image, setting or version: "
            "kept, not used"
        )
    predictions = {prediction.id: prediction for prediction in answers.predictions}
    rows = score_samples(benchmark, samples, predictions)
    results = build_results(
        benchmark,
        data,
        rows,
        model=generator.describe(),
        generation=generator.settings(benchmark.max_new_tokens),
        throughput={
            "wall_s": round(answers.wall_s, 3),
            "generated": answers.generated,
            "samples_per_s": round(answers.generated / answers.wall_s, 2),
            "peak_mem_gb": round(peak_memory_gb(), 3),
            "batch_policy": f"samples<={batch_size}, longest prompt first",
        },
        limit=limit,
        resumed=answers.resumed,
    )
    write_results(folder, results, rows)
    write_submission(folder, benchmark, data, predictions)
    return summary(results)


def describe_benchmark(benchmark: Benchmark) -> str:
    """A few lines for `--list`: size, headline metric, data needed and where it is expected."""
    headline = f"headline: {benchmark.primary_metric}" if benchmark.metrics else "not scored here"
    return (
        f"{benchmark.name} ({benchmark.split} split, {benchmark.n_expected:,} samples, "
        f"{headline})\n  data: {benchmark.data_needed}\n  see: {benchmark.reference}"
    )


def _positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks and the data each needs, then stop")
    parser.add_argument("--model", type=Path, metavar="DIR", help="saved model and processor")
    parser.add_argument("--benchmarks", metavar="A,B", help="names, separated by commas")
    parser.add_argument("--output", type=Path, metavar="DIR", help="results go to DIR/BENCHMARK")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="data in DIR/BENCHMARK instead of the default")
    parser.add_argument("--limit", type=_positive_integer, metavar="N", help="ask only the first N questions")
    parser.add_argument("--batch-size", type=_positive_integer, default=DEFAULT_BATCH_SIZE, metavar="N")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    return parser


if __name__ == "__main__":
    run_script(main)
