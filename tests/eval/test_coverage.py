"""Intervals hold the truth as often as they say, for every kind of metric; `python -m eval.coverage` counts longer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eval.coverage import SIMULATIONS, coverage, main


@pytest.mark.parametrize("name", sorted(SIMULATIONS))
def test_intervals_cover_the_truth(name: str) -> None:
    assert 0.90 <= coverage(SIMULATIONS[name], trials=120, resamples=150) <= 0.99


def test_samples_taken_for_independent_cover_less() -> None:
    simulation = SIMULATIONS["accuracy"]
    assert coverage(simulation, 80, 150, clustered=False) < coverage(simulation, 80, 150) - 0.05


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
