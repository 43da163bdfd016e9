"""What the report shows, read from the files of an evaluation and of the training runs behind it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.files import read_json, read_json_lines
from eval.registry import Baseline, Benchmark, get_benchmark
from eval.results import read_results

MOST_WRONG_SHOWN = 60
RIGHT_SHOWN = 60
_SEED = 0


@dataclass(frozen=True)
class Run:
    """A training run: its name, its run.json, and its loss at the logged steps."""

    name: str
    record: dict[str, Any]
    steps: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Report:
    """All that the page shows: `gallery` has rows of samples.jsonl, wrong ones first; `wrong` and `right` count all."""

    results: dict[str, Any]
    baselines: tuple[Baseline, ...]
    gallery: list[dict[str, Any]]
    wrong: int
    right: int
    image_root: Path
    runs: list[Run]


def gather(evaluation: Path, run_folders: Sequence[Path]) -> Report:
    """Read everything the report shows.

    Raises:
        FileNotFoundError, ValueError: a file is missing or malformed; the message names it.
    """
    results = read_results(evaluation / "results.json")
    samples = read_json_lines(evaluation / "samples.jsonl")
    benchmark = get_benchmark(results["benchmark"]["name"])
    if not benchmark.metrics:
        raise ValueError(f"{evaluation}: {benchmark.name}: {benchmark.not_scored_here}; there is nothing to report")
    wrong = [sample for sample in samples if sample["score"] < 1]
    right = [sample for sample in samples if sample["score"] == 1]
    chooser = random.Random(_SEED)
    gallery = [
        *chooser.sample(wrong, min(len(wrong), MOST_WRONG_SHOWN)),
        *chooser.sample(right, min(len(right), RIGHT_SHOWN)),
    ]
    return Report(
        results=results,
        baselines=benchmark.baselines,
        gallery=gallery,
        wrong=len(wrong),
        right=len(right),
        image_root=_provide_images(benchmark, results["benchmark"], gallery),
        runs=[read_run(folder) for folder in run_folders],
    )


def _provide_images(benchmark: Benchmark, described: dict[str, Any], gallery: list[dict[str, Any]]) -> Path:
    """The folder of the images; those of a table become files there, unless they have in the evaluation."""
    root = Path(described["data_root"])
    image_root = Path(described.get("image_root", root))
    names = [name for sample in gallery for name in sample["images"]]
    if image_root == root or all((image_root / name).is_file() for name in names):
        return image_root
    data = benchmark.load_anywhere(root)
    data.provide_images(names)
    return data.image_root


def read_run(folder: Path) -> Run:
    """Read a run directory. FileNotFoundError names run.json or metrics.jsonl if missing."""
    rows = [row for row in read_json_lines(folder / "metrics.jsonl") if "loss" in row]
    return Run(
        name=folder.resolve().name,
        record=read_json(folder / "run.json"),
        steps=[row["step"] for row in rows],
        losses=[row["loss"] for row in rows],
    )
