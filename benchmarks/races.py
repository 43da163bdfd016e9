"""Races: contestants measured in turn, A B A B, in one process, and what is said about them afterwards.

A round measures every contestant once, in random order; what disturbs the machine disturbs all of them alike.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from benchmarks.sampling import Backends, Sample
from benchmarks.shows import SHOWS
from defocus_mllm.console import one_line

MOST_ROUNDS = 100
WARM_UP_ROUNDS = 2  # the first one compiles and allocates, the second one tells how long a round takes


@dataclass(frozen=True)
class Contestant:
    """One thing that is measured."""

    name: str
    """Unique in its race."""
    sample: Callable[[], Sample]
    """Measures it once."""
    items: int = 1
    """What one measurement is divided by: tokens of a step, tokens decoded."""
    curve: str | None = None
    """The curve of the figure it is a point of, if any."""
    length: int | None = None
    """Tokens of the sequence: its place on that curve."""
    flops: int | None = None
    """Floating-point operations of one measurement, where they are counted."""


@dataclass(frozen=True)
class Comparison:
    """Two contestants whose ratio is of interest."""

    ours: str
    peer: str
    show: str | None = None
    """The claim it belongs to (a name in `SHOWS`), if any."""


@dataclass(frozen=True)
class Race:
    """Contestants that are measured together."""

    title: str
    build: Callable[[], Sequence[Contestant]]
    """Makes the contestants when their turn comes."""
    comparisons: Sequence[Comparison] = ()
    shapes: dict[str, Any] = field(default_factory=dict)
    """What was measured: batch, tokens, layers, ..."""
    unit: str = "s"
    """Of a measurement: "s" or "bytes"."""
    item: str | None = None
    """What `Contestant.items` counts."""
    warm_up: bool = True
    """Whether `WARM_UP_ROUNDS` come before the rounds that count."""


@dataclass(frozen=True)
class Rules:
    """How often, for how long and in which order."""

    repeats: int = 5
    """Rounds at least."""
    seconds: float = 3.0
    """Short contestants get more rounds, up to `MOST_ROUNDS`, until the race takes about this long."""
    seed: int = 0
    """Of the random order in a round."""
    judge: bool = True
    """Whether claims are judged: their limits are about real sizes."""
    clock: Callable[[], float] = time.perf_counter
    """What is read, in seconds."""


class _Runner:
    """A contestant in a race: its samples, or the reason why it dropped out."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.samples: list[float] = []
        self.backends: Backends = {}
        self.error: str | None = None

    def measure(self, counts: bool) -> None:
        """Measure once; a contestant that raises is out, and the others go on."""
        try:
            sample = self.contestant.sample()
        except Exception as error:
            traceback.print_exc()
            self.error = f"{type(error).__name__}: {one_line(error)}"
            return
        for core, names in sample.backends.items():
            self.backends[core] = sorted({*self.backends.get(core, []), *names})
        if counts:
            self.samples.append(sample.value)

    @property
    def cost(self) -> float | None:
        """Median per item; None for one that dropped out."""
        return None if self.error else statistics.median(self.samples) / self.contestant.items

    def describe(self) -> dict[str, Any]:
        """The contestant as `results.json` holds it."""
        contestant = self.contestant
        facts = {"items": contestant.items, "curve": contestant.curve, "length": contestant.length}
        described: dict[str, Any] = {"name": contestant.name, **facts, "backends": self.backends}
        if self.error:
            return {**described, "error": self.error}
        described |= {**summarise(self.samples), "samples": self.samples}
        if contestant.flops:
            described |= {"flops": contestant.flops, "flops_per_second": contestant.flops / described["median"]}
        return described


def summarise(samples: Sequence[float]) -> dict[str, float]:
    """Median, minimum and interquartile range."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [0.0, 0.0, 0.0]
    spread = quartiles[2] - quartiles[0]
    return {"median": statistics.median(samples), "minimum": min(samples), "interquartile_range": spread}


def run_race(race: Race, rules: Rules) -> dict[str, Any]:
    """Measure every contestant of a race, and compare them.

    Returns:
        What `results.json` holds of it. A contestant that raised has an `error`, and so have its comparisons.
    """
    runners = [_Runner(contestant) for contestant in race.build()]
    gc.freeze()  # a collection that walks through all of PyTorch's objects takes longer than many a sample
    try:
        rounds = _run_rounds(race, runners, rules)
    finally:
        gc.unfreeze()
    by_name = {runner.contestant.name: runner for runner in runners}
    return {
        "title": race.title,
        "unit": race.unit,
        "item": race.item,
        "shapes": race.shapes,
        "rounds": rounds,
        "contestants": [runner.describe() for runner in runners],
        "comparisons": [
            _compare(comparison, by_name[comparison.ours], by_name[comparison.peer], rules.judge)
            for comparison in race.comparisons
        ],
    }


def _run_rounds(race: Race, runners: Sequence[_Runner], rules: Rules) -> int:
    """Warm up and measure; returns how many rounds counted."""
    generator = random.Random(rules.seed)
    rounds = rules.repeats
    with tqdm(desc=race.title, total=rounds, unit="round", leave=False, mininterval=0.5) as progress:
        for _ in range(WARM_UP_ROUNDS if race.warm_up else 0):
            started = rules.clock()
            _run_round(runners, generator, counts=False)
            taken = max(rules.clock() - started, 1e-9)
            rounds = max(rules.repeats, min(MOST_ROUNDS, math.ceil(rules.seconds / taken)))
        progress.reset(rounds)
        for _ in range(rounds):
            _run_round(runners, generator, counts=True)
            progress.update()
    return rounds


def _run_round(runners: Sequence[_Runner], generator: random.Random, counts: bool) -> None:
    for runner in generator.sample(runners, len(runners)):
        if runner.error is None:
            runner.measure(counts)


def _compare(comparison: Comparison, ours: _Runner, peer: _Runner, judge: bool) -> dict[str, Any]:
    """Ratio of the medians, ours to the peer's, and whether the claim's limit holds."""
    row: dict[str, Any] = {"ours": comparison.ours, "peer": comparison.peer, "show": comparison.show}
    if ours.cost is None or peer.cost is None:
        dropped = ours if ours.error else peer
        return {**row, "error": f"{dropped.contestant.name}: {dropped.error}"}
    row["ratio"] = ours.cost / peer.cost
    if comparison.show and judge:
        show = SHOWS[comparison.show]
        row |= {
            "threshold": show.describe(),
            "measured": show.measured(row["ratio"]),
            "holds": show.holds(row["ratio"]),
        }
    return row
