"""Measure speed and memory against peers, side by side.

    python -m benchmarks.run --suite cpu --list
    python -m benchmarks.run --suite cpu --output outputs/speed

Writes results.json, results.md and results.svg (or another NAME) in OUTPUT, again after every benchmark. A missed limit
is a result like any other; a measurement that fails is reported, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results as records
from benchmarks.figure import MISSING, can_draw, figure
from benchmarks.isolation import IsolatedError, isolated
from benchmarks.page import markdown
from benchmarks.setting import SUITES, Setting
from benchmarks.shows import SHOWS
from benchmarks.suites import Benchmark, benchmarks_of, perform
from defocus_mllm.console import run_script
from defocus_mllm.files import refuse_existing, write_json_atomically, write_text_atomically

LEAST_REPEATS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen benchmarks, each in a process of its own; returns 1 if a measurement failed, else 0.

    Raises:
        ValueError: a benchmark is unknown, or the suite needs a GPU and there is none.
        FileExistsError: there are results in the output folder already.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argument_parser()
    arguments = parser.parse_args(words)
    benchmarks = chosen(arguments.suite, arguments.only)
    if arguments.list:
        print("\n".join(describe(benchmark) for benchmark in benchmarks))
        return 0
    if arguments.output is None:
        parser.error("the following argument is required: --output")
    setting = Setting.of(arguments.suite, arguments.toy, arguments.repeats, arguments.seed).arguments
    refuse_existing(arguments.output / f"{arguments.name}.json")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not can_draw():
        print(MISSING, flush=True)
    command = shlex.join(["python", "-m", "benchmarks.run", *words])
    results = records.begin(**setting, command=command)
    for number, benchmark in enumerate(benchmarks, 1):
        print(f"[{number}/{len(benchmarks)}] {benchmark.name}: {benchmark.description}", flush=True)
        measure(benchmark, setting, results)
        write(arguments.output / arguments.name, results)
    print(f"\n{summary(results)}\nwritten to {arguments.output}")
    return int(any(benchmark["status"] == "failed" for benchmark in results["benchmarks"]))


def measure(benchmark: Benchmark, setting: dict[str, Any], results: dict[str, Any]) -> None:
    """Run one benchmark in a process of its own and enter its outcome, good or bad, in `results`."""
    started = time.monotonic()
    try:
        races = isolated(perform, benchmark=benchmark.name, **setting)
    except IsolatedError as error:
        records.add_failure(results, benchmark, str(error), time.monotonic() - started)
    else:
        records.add(results, benchmark, races, time.monotonic() - started)


def write(stem: Path, results: dict[str, Any]) -> None:
    """Write `stem`.json, `stem`.svg and `stem`.md, each in one step."""
    record, drawing, page = (stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "svg", "md"))
    write_json_atomically(record, results)
    text = figure(results) if can_draw() else None
    if text is not None:
        write_text_atomically(drawing, text)
    write_text_atomically(page, markdown(results, record.name, None if text is None else drawing.name))


def summary(results: dict[str, Any]) -> str:
    """What the terminal shows at the end: a line for each claim, and what failed."""
    lines = []
    for claim in results["claims"]:
        measured = f" ({claim['measured']:.3g}x)" if "measured" in claim else ""
        lines.append(f"{claim['verdict']:>12}  {claim['claim']}{measured}")
    for benchmark in results["benchmarks"]:
        lines += [f"      FAILED  {benchmark['name']}: {error}" for error in records.errors_of(benchmark)]
    return "\n".join(lines)


def chosen(suite: str, only: Sequence[str] | None) -> list[Benchmark]:
    """The benchmarks of a suite, or those of them that `only` names. Raises `ValueError` for a name it lacks."""
    known = {benchmark.name: benchmark for benchmark in benchmarks_of(suite)}
    for name in only or ():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; there are {', '.join(known)}"
            raise ValueError(f"--only: suite {suite} has no benchmark {name!r}{hint}")
    return [benchmark for name, benchmark in known.items() if only is None or name in only]


def describe(benchmark: Benchmark) -> str:
    """A few lines for `--list`: what is measured, and the claims it judges."""
    claims = [f"    {SHOWS[name].claim}" for name in benchmark.shows]
    return "\n".join([f"{benchmark.name}: {benchmark.description}", *claims])


def _repeats(text: str) -> int:
    number = int(text)
    if number < LEAST_REPEATS:
        raise argparse.ArgumentTypeError(f"must be at least {LEAST_REPEATS}, not {number}")
    return number


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, required=True, help="cpu: float32; gpu: bfloat16 and large models")
    parser.add_argument("--list", action="store_true", help="list the suite's benchmarks and their claims, then stop")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where results go; none of that name may be there")
    parser.add_argument("--name", default="results", help="of the files, without their endings")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these benchmarks and no others")
    parser.add_argument("--repeats", type=_repeats, default=LEAST_REPEATS, metavar="N", help="rounds at least")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, inputs and orders")
    parser.add_argument("--toy", action="store_true", help="tiny shapes on the CPU: tries everything, measures nothing")
    return parser


if __name__ == "__main__":
    run_script(main)
