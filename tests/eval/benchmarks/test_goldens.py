"""Real predictions score what the official scripts print, to all printed digits; mutilated files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.score import score_file

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens"
PRINTED = {
    "pope": [
        *("random_f1 0.871360", "popular_f1 0.862459", "adversarial_f1 0.844587"),
        *("random_accuracy 0.880069", "popular_accuracy 0.874333", "adversarial_accuracy 0.855000"),
        *("random_yes_ratio 0.416838", "popular_yes_ratio 0.413667", "adversarial_yes_ratio 0.433000"),
    ],
    "mme": ["perception 1531.3187", "cognition 295.3571"],
    "scienceqa": ["accuracy 74.39 %", "accuracy_img 71.64 %"],
    "mmbench": ["circular_accuracy 67.6871 %", "first_pass 75.4252 %"],
    "seed_bench": ["accuracy 68.2055 %"],
}

pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"{GOLDENS} is not there")


def predictions_of(name: str) -> Path:
    return next((GOLDENS / name).glob("predictions.*"))


@pytest.mark.parametrize("name", PRINTED)
def test_official_result(name: str, tmp_path: Path) -> None:
    printed = score_file(name, predictions_of(name), tmp_path, GOLDENS / name)
    for result in PRINTED[name]:
        assert f" {result} (95 % interval" in printed
    assert json.loads((tmp_path / "results.json").read_text())["partial"] is False


@pytest.mark.parametrize("name", ["pope", "mme", "scienceqa"])
def test_missing_and_repeated_rows_are_refused(name: str, tmp_path: Path) -> None:
    lines = predictions_of(name).read_text().splitlines(keepends=True)
    mutilated = tmp_path / "predictions.jsonl"
    mutilated.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"1 of \d+ samples have no prediction"):
        score_file(name, mutilated, tmp_path / "out", GOLDENS / name)
    mutilated.write_text("".join([*lines, lines[5]]))
    with pytest.raises(ValueError, match="a second prediction for"):
        score_file(name, mutilated, tmp_path / "out", GOLDENS / name)


@pytest.mark.parametrize("name", ["mmbench", "seed_bench"])
def test_truth_in_the_answer_file_is_checked(name: str, tmp_path: Path) -> None:
    source = predictions_of(name)
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    mutilated = tmp_path / source.name
    mutilated.write_text("".join(line for at, line in enumerate(lines) if at != 9), encoding="utf-8")
    with pytest.raises(ValueError, match="not the official"):
        score_file(name, mutilated, tmp_path / "out", GOLDENS / name)
    mutilated.write_text("".join([*lines, lines[9]]), encoding="utf-8")
    with pytest.raises(ValueError, match="share an identifier"):
        score_file(name, mutilated, tmp_path / "out", GOLDENS / name)
