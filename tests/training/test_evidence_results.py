"""The numbers of the evidence, against values worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.evidence_models import STUDIES, EvidenceModel, Study
from training.evidence_results import Outcome, estimate, read_outcome, student_975, summarise
from training.files import fingerprint

MODELS = (EvidenceModel("plain", "plain", "attention", {}), EvidenceModel("ours", "De-focus", "attention", {}))
STUDY = Study("A study", MODELS, (("ours", "plain"),))
RUN = {"train_seconds": 10.0, "commit": "c", "hardware": {"cores": 2}, "versions": {}, "num_samples": 50}


def outcome(*correct: float, **run: Any) -> Outcome:
    return Outcome(np.array(correct, dtype=float), {**RUN, **run})


def test_estimate_of_one_seed_is_the_binomial_interval() -> None:
    found = estimate([np.array([1.0] * 75 + [0.0] * 25)])
    margin = 1.96 * math.sqrt(0.75 * 0.25 / 99)
    assert found["mean"] == 0.75
    assert found["ci95_images"] == pytest.approx([0.75 - margin, 0.75 + margin], abs=1e-4)
    assert found["ci95_seeds"] is None


def test_estimate_over_seeds_is_students() -> None:
    # accuracies 0.5 and 0.75: standard deviation 0.25 / sqrt 2, over sqrt 2 seeds 0.125, times 12.706
    found = estimate([np.array([1.0, 1, 0, 0]), np.array([1.0, 1, 1, 0])])
    assert found["by_seed"] == [0.5, 0.75]
    assert found["ci95_seeds"] == pytest.approx([0.625 - 12.7062 * 0.125, 0.625 + 12.7062 * 0.125])
    # of the pictures (1, 1, 0.5, 0): variance (2 * 0.375^2 + 0.125^2 + 0.625^2) / 3
    margin = 1.959964 * math.sqrt((2 * 0.375**2 + 0.125**2 + 0.625**2) / 3 / 4)
    assert found["ci95_images"] == pytest.approx([0.625 - margin, 0.625 + margin])


def test_students_quantile_falls_and_never_below_the_truth() -> None:
    values = [student_975(number) for number in range(1, 30)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 12.7062
    assert values[-1] >= 2.0452  # the true value for 29


def test_a_difference_is_paired() -> None:
    # both models fail on the same hard pictures, so the difference is known better than either accuracy
    plain = np.array([1.0] * 50 + [0.0] * 50)
    ours = plain.copy()
    ours[50:54] = 1
    results = summarise(STUDY, MODELS, [0], {"plain": {0: outcome(*plain)}, "ours": {0: outcome(*ours)}}, COUNTS)
    (difference,) = results["comparisons"]
    low, high = difference["ci95_images"]
    assert difference["mean"] == pytest.approx(0.04)
    assert 0 < low < 0.04 < high < 0.08
    width = results["models"][1]["ci95_images"][1] - results["models"][1]["ci95_images"][0]
    assert high - low < width / 2


COUNTS = {"plain": 100, "ours": 101}


def test_partial_results_say_so() -> None:
    outcomes = {"plain": {0: outcome(1, 0), 1: outcome(1, 1)}, "ours": {1: outcome(1, 0, train_seconds=30.0)}}
    results = summarise(STUDY, MODELS, [0, 1], outcomes, COUNTS)
    plain, ours = results["models"]
    assert (results["partial"], results["runs_finished"], results["runs_expected"]) == (True, 3, 4)
    assert (plain["partial"], plain["mean"], plain["train_seconds"]) == (False, 0.75, 10.0)
    assert (ours["partial"], ours["seeds"], ours["parameters"]) == (True, [1], 101)
    (difference,) = results["comparisons"]
    assert difference["seeds"] == [1]  # the seed that both have
    assert difference["partial"]
    assert difference["mean"] == -0.5
    json.dumps(results, allow_nan=False)


def test_nothing_finished_and_a_model_left_out() -> None:
    results = summarise(STUDY, MODELS[:1], [0], {"plain": {}}, COUNTS)
    assert results["comparisons"] == []
    assert results["partial"]
    assert "mean" not in results["models"][0]


def test_provenance_names_every_commit_and_machine_once() -> None:
    outcomes = {"plain": {0: outcome(1, 0), 1: outcome(1, 1)}, "ours": {0: outcome(1, 0, commit="d"), 1: outcome(1, 0)}}
    results = summarise(STUDY, MODELS, [0, 1], outcomes, COUNTS)
    assert results["commits"] == ["c", "d"]
    assert results["hardware"] == [{"cores": 2}]
    assert results["pictures"] == {"train": [50], "test": [2]}
    assert not results["partial"]


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """A run's folder and its predictions, two of three right."""
    folder, predictions = tmp_path / "run", tmp_path / "predictions.json"
    folder.mkdir()
    run = {"stage": "stage0_vision", "status": "complete", "arguments": {}, "inputs": {}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "model.safetensors").write_bytes(b"weights")
    content = {"model": fingerprint(folder), "data": "test", "labels": [0, 1, 1], "predictions": [0, 1, 0]}
    predictions.write_text(json.dumps(content))
    return folder, predictions


def test_outcome_is_read(finished: tuple[Path, Path]) -> None:
    found = read_outcome(*finished, "test")
    assert found is not None
    assert found.correct.tolist() == [1, 1, 0]
    assert found.accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize("change", ["weights", "pictures", "status", "predictions", "run"])
def test_no_outcome_of_other_weights_or_pictures_or_of_an_unfinished_run(
    finished: tuple[Path, Path], change: str
) -> None:
    folder, predictions = finished
    if change == "weights":
        (folder / "model.safetensors").write_bytes(b"others")
    elif change == "predictions":
        predictions.unlink()
    elif change == "run":
        (folder / "run.json").unlink()
    elif change == "status":
        path = folder / "run.json"
        path.write_text(path.read_text().replace("complete", "running"))
    assert read_outcome(folder, predictions, "others" if change == "pictures" else "test") is None


def test_every_study_can_be_summarised_before_its_first_run() -> None:
    for study in STUDIES.values():
        none = {model.name: {} for model in study.models}
        results = summarise(study, study.models, [0], none, dict.fromkeys(none, 1))
        assert len(results["models"]) == len(study.models)
