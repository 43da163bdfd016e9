"""How often do the 95 % intervals hold the truth? Simulated benchmarks, whose truth is known, tell.

    python -m eval.coverage --output docs/results/interval_coverage.json

Four kinds of metric: a mean (accuracy), a ratio (F1), a sum of ratios over tasks with groups (MME's score) and a mean
of groups (circular accuracy). In all of them questions about one image share its difficulty, drawn from a beta
distribution, so that an interval that took questions for independent would be too short.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from defocus_mllm.console import run_script
from defocus_mllm.files import write_text_atomically
from eval.bootstrap import RESAMPLES, estimate
from eval.environment import describe_environment
from eval.measures import Statistic, mean
from eval.metrics.yes_no import COGNITION, PERCEPTION, mme_points, pope_f1

CLUSTERS = 400
_MME_TASKS = ((12, 1), (9, 1), (7, 2), (6, 2), (9, 2), (8, 2), (8, 4), (6, 4), (9, 4), (5, 4))
"""MME's ten categories of perception: parameters of the beta distribution of an image's rate of right answers."""
_MME_IMAGES_PER_TASK = CLUSTERS // len(_MME_TASKS)


@dataclass(frozen=True)
class Simulation:
    """A benchmark that can be drawn again and again.

    `draw` gives the summands (samples, k) of one draw and each sample's cluster; `statistic` turns their sum into the
    metric, which has the value `truth` in an endless benchmark.
    """

    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
    statistic: Statistic
    truth: float


def _draw_accuracy(generator: np.random.Generator, questions: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rates = generator.beta(8, 2, CLUSTERS).repeat(questions)
    scores = generator.random(len(rates)) < rates
    return np.column_stack([scores, np.ones_like(rates)]), np.arange(CLUSTERS).repeat(questions)


def _draw_f1(generator: np.random.Generator, questions: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """POPE: half the questions have the answer yes; summands as `pope_f1` takes them."""
    present = np.tile(np.arange(questions) % 2 == 0, CLUSTERS)
    found = generator.beta(8.5, 1.5, CLUSTERS).repeat(questions)
    imagined = generator.beta(1.2, 8.8, CLUSTERS).repeat(questions)
    says_yes = generator.random(len(present)) < np.where(present, found, imagined)
    outcomes = (says_yes & present, says_yes & ~present, ~says_yes & ~present, ~says_yes & present)
    summands = np.column_stack([*outcomes, np.zeros_like(present)])
    return summands.astype(float), np.arange(CLUSTERS).repeat(questions)


def _draw_mme(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two questions an image; summands as `mme_points` takes them, of the categories of perception only."""
    categories = len(PERCEPTION) + len(COGNITION)
    blocks = np.zeros((len(_MME_TASKS), _MME_IMAGES_PER_TASK, 2, categories, 4))
    for task, parameters in enumerate(_MME_TASKS):
        rates = generator.beta(*parameters, _MME_IMAGES_PER_TASK)
        right = generator.random((_MME_IMAGES_PER_TASK, 2)) < rates[:, None]
        blocks[task, :, :, task, 0] = right
        blocks[task, :, :, task, 1] = 1
        blocks[task, :, 0, task, 2] = right.all(axis=1)
        blocks[task, :, 0, task, 3] = 1
    return blocks.reshape(-1, 4 * categories), np.arange(CLUSTERS).repeat(2)


def _draw_circular(generator: np.random.Generator, rotations: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A question counts if all rotations of its choices are answered; its first row stands for the group."""
    rates = generator.beta(8, 1, CLUSTERS)
    right = generator.random((CLUSTERS, rotations)) < rates[:, None]
    summands = np.zeros((CLUSTERS, rotations, 2))
    summands[:, 0] = np.column_stack([right.all(axis=1), np.ones(CLUSTERS)])
    return summands.reshape(-1, 2), np.arange(CLUSTERS).repeat(rotations)


def _moment(alpha: float, beta: float, power: int) -> float:
    """E[x^power] of a beta distribution: the probability that `power` answers about one image are all right."""
    return math.prod((alpha + step) / (alpha + beta + step) for step in range(power))


_MME_TRUTH = 100 * sum(_moment(*task, 1) + _moment(*task, 2) for task in _MME_TASKS)
SIMULATIONS = {
    "accuracy": Simulation(_draw_accuracy, mean, _moment(8, 2, 1)),
    "f1": Simulation(_draw_f1, pope_f1, 2 * 0.85 / (1 + 0.85 + 0.12)),
    "mme_score": Simulation(_draw_mme, mme_points(PERCEPTION), _MME_TRUTH),
    "circular_accuracy": Simulation(_draw_circular, mean, _moment(8, 1, 4)),
}


def coverage(simulation: Simulation, trials: int, resamples: int, seed: int = 0) -> float:
    """Share of `trials` whose interval holds the truth."""
    generator = np.random.default_rng(seed)
    held = 0
    for trial in tqdm(range(trials), unit="benchmark", leave=False):
        summands, clusters = simulation.draw(generator)
        found = estimate(
            summands,
            [str(cluster) for cluster in clusters],
            simulation.statistic,
            resamples=resamples,
            seed=seed + trial,
        )
        held += found["ci95"][0] <= simulation.truth <= found["ci95"][1]
    return held / trials


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, simulate, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1000, metavar="N", help="benchmarks drawn for each metric")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, metavar="N", help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write JSON")
    arguments = parser.parse_args(argv)
    record: dict[str, Any] = {name: getattr(arguments, name) for name in ("trials", "resamples", "seed")}
    record |= {"clusters": CLUSTERS, "nominal": 0.95, "coverage": {}}
    for name, simulation in SIMULATIONS.items():
        share = coverage(simulation, arguments.trials, arguments.resamples, arguments.seed)
        record["coverage"][name] = {"truth": simulation.truth, "covered": share}
        error = math.sqrt(share * (1 - share) / arguments.trials)
        print(f"{name}: {100 * share:.1f} % of {arguments.trials} intervals hold the truth (+- {100 * error:.1f})")
    record["env"] = describe_environment()
    if arguments.output is not None:
        write_text_atomically(arguments.output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
