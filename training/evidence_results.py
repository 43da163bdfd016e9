"""From finished runs to numbers: accuracies, intervals and differences of the evidence's models.

Two intervals of 95 % say two things. "Images": other test pictures of the same kind, these weights; from the standard
error over pictures of the correctness averaged over seeds (normal approximation; for one seed the binomial interval).
"Seeds": other initial weights and orders, these pictures; Student's t over the accuracies of the seeds. A difference is
paired in both: picture by picture, seed by seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.evidence_models import EvidenceModel, Study
from training.files import fingerprint
from training.run_record import read_run

NORMAL_975 = 1.959964
STUDENT_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""97.5 % quantile of Student's t with 1, 2, ... 9 degrees of freedom."""


@dataclass(frozen=True)
class Outcome:
    """A finished run and what it says to every test picture."""

    correct: np.ndarray
    """(pictures,) float: 1 where the prediction is right, else 0."""
    run: Mapping[str, Any]
    """Its run.json."""

    @property
    def accuracy(self) -> float:
        """Share of the pictures that are right."""
        return float(self.correct.mean())


Outcomes = Mapping[str, Mapping[int, Outcome]]
"""Model -> seed -> outcome, of the runs that are finished."""


def read_outcome(run_folder: Path, predictions: Path, test_fingerprint: str) -> Outcome | None:
    """The outcome of a run, None if it is not finished or its predictions are not of these weights and pictures."""
    run = read_run(run_folder)
    if run is None or run["status"] != "complete" or not predictions.is_file():
        return None
    content = json.loads(predictions.read_text(encoding="utf-8"))
    if content["model"] != fingerprint(run_folder) or content["data"] != test_fingerprint:
        return None
    correct = np.asarray(content["predictions"]) == np.asarray(content["labels"])
    return Outcome(correct.astype(float), run)


def summarise(
    study: Study,
    models: Sequence[EvidenceModel],
    seeds: Sequence[int],
    outcomes: Outcomes,
    parameters: Mapping[str, int],
) -> dict[str, Any]:
    """What `results.json` holds: one row a model, one row a comparison; partial where runs are not finished.

    A comparison uses the seeds that both models have; it is absent while there are none.
    """
    finished = sum(len(outcomes[model.name]) for model in models)
    rows = []
    for model in models:
        of_seeds = outcomes[model.name]
        row: dict[str, Any] = {"name": model.name, "title": model.title, "parameters": parameters[model.name]}
        row |= {"seeds": sorted(of_seeds), "partial": len(of_seeds) < len(seeds)}
        if of_seeds:
            row |= estimate([of_seeds[seed].correct for seed in row["seeds"]])
            row["train_seconds"] = float(np.mean([outcome.run["train_seconds"] for outcome in of_seeds.values()]))
        rows.append(row)
    return {
        "study": study.title,
        "partial": finished < len(models) * len(seeds),
        "runs_finished": finished,
        "runs_expected": len(models) * len(seeds),
        "seeds": list(seeds),
        "models": rows,
        "comparisons": _comparisons(study, models, seeds, outcomes),
        **_provenance(outcomes),
    }


def estimate(scores: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean of `scores`, one (pictures,) array a seed, with the interval over images and, from two seeds, over seeds."""
    of_pictures = np.mean(scores, axis=0)
    of_seeds = [float(score.mean()) for score in scores]
    mean = float(of_pictures.mean())
    margin = NORMAL_975 * float(of_pictures.std(ddof=1)) / math.sqrt(len(of_pictures))
    found = {"mean": mean, "by_seed": of_seeds, "ci95_images": [mean - margin, mean + margin], "ci95_seeds": None}
    if len(of_seeds) > 1:
        margin = student_975(len(of_seeds) - 1) * float(np.std(of_seeds, ddof=1)) / math.sqrt(len(of_seeds))
        found["ci95_seeds"] = [mean - margin, mean + margin]
    return found


def student_975(degrees_of_freedom: int) -> float:
    """97.5 % quantile of Student's t; above 9 degrees of freedom the value of 9, which is on the safe side."""
    return STUDENT_975[min(degrees_of_freedom, len(STUDENT_975)) - 1]


def _comparisons(
    study: Study, models: Sequence[EvidenceModel], seeds: Sequence[int], outcomes: Outcomes
) -> list[dict[str, Any]]:
    titles = {model.name: model.title for model in models}
    rows = []
    for name, reference in study.comparisons:
        if name not in titles or reference not in titles:
            continue
        shared = sorted(set(outcomes[name]) & set(outcomes[reference]))
        if shared:
            differences = [outcomes[name][seed].correct - outcomes[reference][seed].correct for seed in shared]
            row: dict[str, Any] = {"model": titles[name], "reference": titles[reference], "seeds": shared}
            rows.append({**row, "partial": len(shared) < len(seeds), **estimate(differences)})
    return rows


def _provenance(outcomes: Outcomes) -> dict[str, Any]:
    """What made the runs; every value that occurs, since they may come from several days and machines."""
    runs = [outcome.run for of_seeds in outcomes.values() for outcome in of_seeds.values()]

    def distinct(values: Sequence[Any]) -> list[Any]:
        return [json.loads(text) for text in sorted({json.dumps(value, sort_keys=True) for value in values})]

    return {
        "commits": distinct([run["commit"] for run in runs]),
        "hardware": distinct([run["hardware"] for run in runs]),
        "versions": distinct([run["versions"] for run in runs]),
        "pictures": {
            "train": distinct([run["num_samples"] for run in runs]),
            "test": distinct([len(outcome.correct) for of_seeds in outcomes.values() for outcome in of_seeds.values()]),
        },
    }
