"""Generate answers to benchmarks and score them.

    python -m eval.run --list [--data-root DIR]
    python -m eval.run --model outputs/quickstart/stage2 --benchmarks easy_vqa --output outputs/quickstart/eval

Writes OUTPUT/BENCHMARK/{predictions.jsonl, samples.jsonl, results.json}. Interrupted, even by kill -9, the same command
resumes, with another number of `--processes` too. `--limit N` asks only the first N questions; such a run prints no
headline number, nor does one in which a sample could not be answered; that one ends with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from defocus_mllm.console import one_line, run_script
from eval.batches import DEFAULT_SAMPLES, DEFAULT_TOKENS, BatchPolicy
from eval.environment import peak_memory_gb
from eval.files import first_of
from eval.generator import Generator, TransformersGenerator
from eval.layouts import check_data_root
from eval.listing import check_data_are_here, list_benchmarks
from eval.registry import Benchmark, get_benchmark
from eval.results import build_results, keep_complete, score_samples, summary, write_results, write_submission, written
from eval.runner import Answers, generate_answers
from eval.samples import BenchmarkData
from eval.workers import WorkerLostError, Workers

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Number formats that a checkpoint can be loaded in; "auto" keeps the saved one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, then evaluate each benchmark in turn."""
    parser = _argument_parser()
    arguments = parser.parse_args(argv)
    check_data_root(arguments.data_root)
    if arguments.list:
        print(list_benchmarks(arguments.data_root))
        return
    missing = [f"--{name}" for name in ("model", "benchmarks", "output") if getattr(arguments, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    benchmarks = [get_benchmark(name.strip()) for name in arguments.benchmarks.split(",")]
    check_data_are_here(benchmarks, arguments.data_root)
    make_generator = functools.partial(
        generator_of_process, arguments.model, arguments.device, arguments.dtype, arguments.processes
    )
    generator = make_generator(0)
    scope = {
        name: getattr(arguments, name) for name in ("data_root", "limit", "batch_size", "batch_tokens", "likelihood")
    }
    with contextlib.ExitStack() as stack:
        workers = None
        if arguments.processes > 1:
            workers = stack.enter_context(Workers(make_generator, arguments.processes - 1))
        evaluate_all(benchmarks, generator, arguments.output, workers=workers, **scope)


def evaluate_all(benchmarks: Sequence[Benchmark], generator: Generator, output: Path, **settings: Any) -> None:
    """`evaluate` each benchmark and print its summary; what is wrong with the data of one does not keep the others
    from being evaluated, but is raised at the end.

    Raises:
        WorkerLostError, OSError: at once, for the next benchmark would meet the same.
        FileNotFoundError, ValueError: the one failure, or a ValueError that tells all of them.
    """
    failures: list[Exception] = []
    for benchmark in benchmarks:
        try:
            print(evaluate(benchmark, generator, output, **settings), flush=True)
        except WorkerLostError:
            raise
        except (FileNotFoundError, ValueError) as error:
            failures.append(error)
            if benchmark is not benchmarks[-1]:
                print(f"{benchmark.name} failed, going on with the others: {one_line(error)}", flush=True)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ValueError("; ".join(map(str, failures)))


class SamplesFailedError(ValueError):
    """Some samples could not be answered; results of the others are on disk, without a headline number."""


def generator_of_process(
    model: str, device: str | None, dtype: str, processes: int, number: int
) -> TransformersGenerator:
    """The model of process `number` of `processes`: GPUs are dealt out in turn, CPU threads are shared out."""
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{number % torch.cuda.device_count()}"
    elif processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    return TransformersGenerator(model, device, dtype)


def evaluate(
    benchmark: Benchmark,
    generator: Generator,
    output: Path,
    data_root: Path | None = None,
    limit: int | None = None,
    batch_size: int = DEFAULT_SAMPLES,
    batch_tokens: int = DEFAULT_TOKENS,
    workers: Workers | None = None,
    likelihood: bool = False,
) -> str:
    """Evaluate a model on one benchmark, write `output`/BENCHMARK and return the summary to print.

    `workers` answer beside this process; `likelihood` scores the benchmark's options beside the generated answers.

    Raises:
        SamplesFailedError: a sample could not be answered; the message names the first ones, everything is written.
        FileNotFoundError, ValueError: data or images missing, malformed or not the official ones; `limit` would replace
            a complete result by a partial one.
    """
    folder = output / benchmark.name
    data = benchmark.load_verified(data_root)
    benchmark.check_askable(data)
    samples = data.samples[:limit]
    policy = BatchPolicy(batch_size, batch_tokens)
    keep_complete(folder, benchmark, partial=len(samples) < len(data.samples))
    data.provide_images(image for sample in samples for image in sample.images)
    answers = generate_answers(
        benchmark,
        data.image_root,
        samples,
        generator,
        folder / "predictions.jsonl",
        policy,
        outdated=folder / "results.json",  # no result of an earlier model may stand beside new predictions
        workers=workers,
        likelihood=likelihood,
    )
    if answers.other_keys:
        print(
            f"{folder / 'predictions.jsonl'}: {answers.other_keys} predictions made with another model, image, setting "
            "or version: kept, not used"
        )
    _fail_if_nothing_was_answered(benchmark, answers)
    throughput = _throughput(answers, policy, workers)
    return _score_and_write(benchmark, data, generator, answers, folder, limit=limit, throughput=throughput)


def _score_and_write(
    benchmark: Benchmark,
    data: BenchmarkData,
    generator: Generator,
    answers: Answers,
    folder: Path,
    *,
    limit: int | None,
    throughput: dict[str, Any],
) -> str:
    predictions = {prediction.id: prediction for prediction in answers.predictions}
    rows = score_samples(benchmark, data.samples, predictions)
    results = build_results(
        benchmark,
        data,
        rows,
        model=generator.describe(),
        generation=generator.settings(benchmark.max_new_tokens),
        throughput=throughput,
        limit=limit,
        resumed=answers.resumed,
        failures=answers.failures,
    )
    keep_complete(folder, benchmark, partial=results["partial"])
    write_results(folder, results, rows)
    if answers.failures:
        print(summary(results), flush=True)
        raise SamplesFailedError(_describe_failures(benchmark, answers))
    return "\n  ".join([summary(results), *written(write_submission(folder, benchmark, data, predictions))])


def _fail_if_nothing_was_answered(benchmark: Benchmark, answers: Answers) -> None:
    if answers.failures and not answers.predictions:
        raise SamplesFailedError(_describe_failures(benchmark, answers))


def _describe_failures(benchmark: Benchmark, answers: Answers) -> str:
    reasons = first_of(f"{sample} ({reason})" for sample, reason in answers.failures.items())
    count = len(answers.failures)
    return f"{benchmark.name}: {count} samples could not be answered: {reasons}; mend them and run again"


def _throughput(answers: Answers, policy: BatchPolicy, workers: Workers | None) -> dict[str, Any]:
    tokens = [(prediction.n_in or 0, prediction.n_out or 0) for prediction in answers.fresh]
    return {
        "wall_s": round(answers.wall_s, 3),
        "generated": answers.generated,
        "samples_per_s": round(answers.generated / answers.wall_s, 2),
        "prompt_tok_s": round(sum(n_in for n_in, _ in tokens) / answers.wall_s, 1),
        "answer_tok_s": round(sum(n_out for _, n_out in tokens) / answers.wall_s, 1),
        "peak_mem_gb": round(peak_memory_gb(), 3),
        "batch_policy": str(policy),
        "oom_backoffs": answers.backoffs,
        "processes": 1 + (workers.count if workers else 0),
    }


def _positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks, their data and whether they are here")
    parser.add_argument("--model", metavar="DIR", help="saved model and processor, or USER/NAME[@REVISION] on the Hub")
    parser.add_argument("--benchmarks", metavar="A,B", help="names, separated by commas")
    parser.add_argument("--output", type=Path, metavar="DIR", help="results go to DIR/BENCHMARK")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="data in DIR/BENCHMARK instead of the default")
    parser.add_argument("--limit", type=_positive_integer, metavar="N", help="ask only the first N questions")
    parser.add_argument(
        "--batch-size", type=_positive_integer, default=DEFAULT_SAMPLES, metavar="N", help="most samples"
    )
    parser.add_argument(
        "--batch-tokens", type=_positive_integer, default=DEFAULT_TOKENS, metavar="N", help="most tokens, images too"
    )
    parser.add_argument("--processes", type=_positive_integer, default=1, metavar="N", help="each with its own model")
    parser.add_argument("--likelihood", action="store_true", help="also the log-likelihood of each given option")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights (default: as saved)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    return parser


if __name__ == "__main__":
    run_script(main)
