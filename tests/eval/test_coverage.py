"""Intervals hold the truth as often as they say, for every kind of metric; `python -m eval.coverage` counts longer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eval.bootstrap import estimate
from eval.coverage import SIMULATIONS, coverage, main


@pytest.mark.parametrize("name", sorted(SIMULATIONS))
def test_intervals_cover_the_truth(name: str) -> None:
    assert 0.89 <= coverage(SIMULATIONS[name], trials=150, resamples=300) <= 0.99


def test_questions_about_one_image_are_not_independent() -> None:
    summands, clusters = SIMULATIONS["accuracy"].draw(np.random.default_rng(0))
    clustered = estimate(summands, [str(cluster) for cluster in clusters])["se"]
    independent = estimate(summands, [str(row) for row in range(len(summands))])["se"]
    # Five answers with a correlation of 1 / (8 + 2 + 1): the variance grows by 1 + 4 / 11.
    assert clustered / independent == pytest.approx((1 + 4 / 11) ** 0.5, rel=0.08)


@pytest.mark.parametrize("name", sorted(SIMULATIONS))
def test_the_truth_is_what_many_draws_tend_to(name: str) -> None:
    simulation, generator = SIMULATIONS[name], np.random.default_rng(1)
    draws = np.array([simulation.draw(generator)[0].sum(axis=0) for _ in range(300)])
    spread = np.std(simulation.statistic(draws)) / np.sqrt(len(draws))
    assert simulation.statistic(draws.sum(axis=0)) == pytest.approx(simulation.truth, abs=4 * spread)


def test_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--trials", "3", "--resamples", "20", "--output", str(tmp_path / "coverage.json")])
    record = json.loads((tmp_path / "coverage.json").read_text())
    assert set(record["coverage"]) == set(SIMULATIONS)
    assert "circular_accuracy: " in capsys.readouterr().out
