"""Numbers as a reader sees them, and the curves of the figure."""

from __future__ import annotations

import pytest

from benchmarks.figure import curves_of, figure
from benchmarks.page import duration, size
from benchmarks.shows import SHOWS


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (3.4567e-6, "3.46 µs"),
        (0.0012345, "1.23 ms"),
        (0.9876, "988 ms"),
        (1.5, "1.5 s"),
        (217.4, "217 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(1.2345e9, "1.23 GB"), (9.9e8, "990 MB"), (1.5e6, "1.5 MB")])
def test_sizes(number: float, text: str) -> None:
    assert size(number) == text


def point(curve: str | None, length: int | None, **measured: float) -> dict:
    return {"name": f"{curve} {length}", "curve": curve, "length": length, **measured}


def test_curves_join_the_points_of_several_races() -> None:
    races = [
        {"contestants": [point("ours", 10, median=1.0), point(None, None, median=9.0)]},
        {"contestants": [point("ours", 20, median=2.0), point("peer", 10), point("peer", 20, median=4.0)]},
        {"title": "failed", "error": "no memory"},
    ]
    assert curves_of({"races": races}) == {"ours": {10: 1.0, 20: 2.0}, "peer": {20: 4.0}}


def test_a_figure_has_a_panel_a_benchmark_with_curves() -> None:
    def benchmark(name: str, curve: str | None) -> dict:
        contestants = [point(curve, length, median=1e-3 * length) for length in (16, 256)]
        return {"name": name, "races": [{"contestants": contestants}]}

    results = {"benchmarks": [benchmark("growth", "De-focus"), benchmark("memory", None)]}
    drawing = figure(results)
    assert drawing is not None
    assert drawing == figure(results), "the same results give the same bytes"
    assert figure({"benchmarks": results["benchmarks"][1:]}) is None


@pytest.mark.parametrize("show", SHOWS.values(), ids=SHOWS)
def test_every_claim_states_its_limit(show) -> None:
    assert f"{show.limit:g}x" in show.claim or (show.limit, "faster than" in show.claim) == (1, True)
    at, beyond = show.limit, show.limit * 1.01
    kept, missed = (at, beyond) if show.kind == "cost" else (1 / at, 1 / (at * 0.99))
    assert show.holds(kept)
    assert not show.holds(missed)
