"""How much faster is `eval.run` than asking one question at a time?

    python -m eval.throughput --model outputs/quickstart/stage2 --output docs/results/eval_throughput.json

Both ways answer questions of easy-VQA's official test split with the same model in the same process, in turns, so that
whatever else the machine does meets both. The questions are the first ones, about ten to an image as in the whole
split. One at a time, nothing is kept from question to question. `eval.run`'s way has all its costs: digests, journal,
batches. Ratios of medians are reported, and how many answers are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from defocus_mllm.console import run_script
from defocus_mllm.files import write_text_atomically
from eval.batches import BatchPolicy
from eval.environment import describe_environment
from eval.generator import Request, TransformersGenerator
from eval.registry import Benchmark, get_benchmark
from eval.runner import generate_answers
from eval.samples import BenchmarkData


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="saved model and processor")
    parser.add_argument("--questions", type=int, default=256, metavar="N", help="answered by eval.run in a round")
    parser.add_argument("--singles", type=int, default=64, metavar="N", help="of them answered one at a time")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write JSON")
    arguments = parser.parse_args(argv)
    benchmark = get_benchmark("easy_vqa")
    generator = TransformersGenerator(arguments.model, arguments.device)
    record = measure(
        benchmark, benchmark.load_verified(None), generator, arguments.questions, arguments.singles, arguments.rounds
    )
    record |= {"model": generator.describe(), "policy": str(BatchPolicy()), "env": describe_environment()}
    print(
        f"eval.run: {record['batched_per_s']:.1f} answers/s, one at a time: {record['single_per_s']:.1f}; "
        f"{record['ratio']:.2f} times as many; {record['same_answers']}/{record['singles']} answers are the same"
    )
    if arguments.output is not None:
        write_text_atomically(arguments.output, json.dumps(record, indent=2) + "\n")


def measure(
    benchmark: Benchmark,
    data: BenchmarkData,
    generator: TransformersGenerator,
    questions: int,
    singles: int,
    rounds: int,
) -> dict[str, Any]:
    """Answers a second both ways (medians over rounds), their ratio, and how many answers are the same."""
    samples = data.samples[:questions]
    requests = [
        Request(sample.id, benchmark.prompt(sample), tuple(data.root / image for image in sample.images))
        for sample in samples[:: max(1, len(samples) // singles)][:singles]
    ]
    generator.generate(requests[:2], benchmark.max_new_tokens)  # what happens once only is nobody's
    batched_rates, single_rates = [], []
    for _ in range(rounds):
        generator.forget_images()
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            answers = generate_answers(
                benchmark, data.root, samples, generator, Path(folder) / "predictions.jsonl", BatchPolicy()
            )
            batched_rates.append(len(samples) / (time.perf_counter() - started))
        started = time.perf_counter()
        alone = []
        for request in requests:
            generator.forget_images()
            alone += generator.generate([request], benchmark.max_new_tokens)
        single_rates.append(len(requests) / (time.perf_counter() - started))
    texts = {prediction.id: prediction.text for prediction in answers.predictions}
    batched, single = statistics.median(batched_rates), statistics.median(single_rates)
    return {
        "questions": len(samples),
        "singles": len(requests),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "batched_per_s": batched,
        "single_per_s": single,
        "ratio": batched / single,
        "same_answers": sum(texts[prediction.id] == prediction.text for prediction in alone),
    }


if __name__ == "__main__":
    run_script(main)
