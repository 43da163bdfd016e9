"""The harness with a clock and contestants that we hold in our hands."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.races import MOST_ROUNDS, WARM_UP_ROUNDS, Comparison, Contestant, Race, Rules, run_race, summarise
from benchmarks.sampling import Sample


class Track:
    """A clock that only contestants move, and a list of who ran."""

    def __init__(self) -> None:
        self.time = 0.0
        self.ran: list[str] = []

    def contestant(self, name: str, costs: Callable[[int], float], **facts: Any) -> Contestant:
        """Costs `costs(n)` seconds the n-th time, from 0."""

        def sample() -> Sample:
            cost = costs(self.ran.count(name))
            self.ran.append(name)
            self.time += cost
            return Sample(cost, {"core": ["slow" if cost > 5 else "fast"]})

        return Contestant(name, sample, **facts)

    def rules(self, **fields: Any) -> Rules:
        return Rules(**{"seconds": 0.0, "clock": lambda: self.time, **fields})


def run(track: Track, *contestants: Contestant, comparisons: tuple[Comparison, ...] = (), **fields: Any) -> dict:
    race = Race("a race", lambda: contestants, comparisons)
    return run_race(race, track.rules(**fields))


def test_every_round_runs_everyone_once_in_an_order_that_changes() -> None:
    track = Track()
    run(track, *(track.contestant(name, lambda _: 1.0) for name in "ABC"), repeats=12)
    rounds = [tuple(track.ran[start : start + 3]) for start in range(0, len(track.ran), 3)]
    assert len(rounds) == 12 + WARM_UP_ROUNDS
    assert all(sorted(order) == ["A", "B", "C"] for order in rounds)
    assert len(set(rounds)) > 2
    again = Track()
    run(again, *(again.contestant(name, lambda _: 1.0) for name in "ABC"), repeats=12)
    assert again.ran == track.ran, "the seed decides the order"
    other = Track()
    run(other, *(other.contestant(name, lambda _: 1.0) for name in "ABC"), repeats=12, seed=1)
    assert other.ran != track.ran


def test_statistics_leave_the_warm_up_out() -> None:
    track = Track()
    costs = [100.0] * WARM_UP_ROUNDS + [4.0, 1.0, 2.0, 3.0, 5.0]
    result = run(track, track.contestant("A", costs.__getitem__), repeats=5)
    (contestant,) = result["contestants"]
    assert result["rounds"] == 5
    assert contestant["samples"] == [4.0, 1.0, 2.0, 3.0, 5.0]
    assert (contestant["median"], contestant["minimum"], contestant["interquartile_range"]) == (3.0, 1.0, 2.0)


def test_one_sample_has_no_spread() -> None:
    assert summarise([2.0]) == {"median": 2.0, "minimum": 2.0, "interquartile_range": 0.0}


@pytest.mark.parametrize(("cost", "rounds"), [(10.0, 5), (0.5, 6), (0.1, 30), (1e-6, MOST_ROUNDS)])
def test_short_races_get_more_rounds(cost: float, rounds: int) -> None:
    track = Track()
    assert run(track, track.contestant("A", lambda _: cost), repeats=5, seconds=3.0)["rounds"] == rounds


def test_the_second_warm_up_round_tells_how_long_a_round_takes() -> None:
    track = Track()
    result = run(track, track.contestant("A", lambda number: 50.0 if number == 0 else 1.0), repeats=5, seconds=9.0)
    assert result["rounds"] == 9


def test_without_warm_up_every_run_counts() -> None:
    track = Track()
    race = Race("memory", lambda: [track.contestant("A", lambda _: 1.0)], unit="bytes", warm_up=False)
    result = run_race(race, track.rules(repeats=3, seconds=100.0))
    assert (result["rounds"], len(track.ran), result["unit"]) == (3, 3, "bytes")


def test_a_cost_is_ours_to_the_peers_and_a_limit_is_kept_or_missed() -> None:
    track = Track()
    contestants = [track.contestant("ours", lambda _: 1.2), track.contestant("peer", lambda _: 1.0)]
    comparisons = (
        Comparison("ours", "peer", "attention_short"),
        Comparison("ours", "peer", "attention_long"),
        Comparison("ours", "peer"),
    )
    kept, missed, plain = run(track, *contestants, comparisons=comparisons)["comparisons"]
    assert kept["ratio"] == missed["ratio"] == plain["ratio"] == pytest.approx(1.2)
    assert (kept["holds"], missed["holds"]) == (True, False)
    assert kept["threshold"]["kind"] == "at most"
    assert (kept["threshold"]["limit"], missed["threshold"]["limit"]) == (1.25, 1.15)
    assert "holds" not in plain


@pytest.mark.parametrize(("peer", "holds"), [(3.4, False), (3.6, True)])
def test_a_speed_is_the_peers_to_ours(peer: float, holds: bool) -> None:
    track = Track()
    contestants = [track.contestant("ours", lambda _: 1.0), track.contestant("peer", lambda _: peer)]
    result = run(track, *contestants, comparisons=(Comparison("ours", "peer", "mamba_plain"),))
    (row,) = result["comparisons"]
    assert row["measured"] == pytest.approx(peer)
    assert row["holds"] is holds
    assert row["threshold"]["kind"] == "at least"


def test_costs_are_compared_per_item() -> None:
    track = Track()
    contestants = [
        track.contestant("long", lambda _: 8.0, items=4),
        track.contestant("short", lambda _: 1.0, items=1),
    ]
    (row,) = run(track, *contestants, comparisons=(Comparison("long", "short"),))["comparisons"]
    assert row["ratio"] == pytest.approx(2.0)


def test_at_toy_sizes_nothing_is_judged() -> None:
    track = Track()
    contestants = [track.contestant("ours", lambda _: 1.0), track.contestant("peer", lambda _: 1.0)]
    result = run(track, *contestants, comparisons=(Comparison("ours", "peer", "vit_forward"),), judge=False)
    assert {"holds", "threshold", "measured"}.isdisjoint(result["comparisons"][0])


def test_one_that_fails_is_out_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    track = Track()

    def fail(number: int) -> float:
        if number == 0:
            track.ran.append("broken")
            raise RuntimeError("out of\nmemory")
        raise AssertionError("measured again after it failed")

    contestants = [track.contestant("broken", fail), track.contestant("peer", lambda _: 1.0)]
    contestants.append(track.contestant("ours", lambda _: 2.0))
    comparisons = (Comparison("ours", "broken", "vit_forward"), Comparison("ours", "peer"))
    result = run(track, *contestants, comparisons=comparisons, repeats=5)
    by_name = {contestant["name"]: contestant for contestant in result["contestants"]}
    assert by_name["broken"]["error"] == "RuntimeError: out of memory"
    assert "median" not in by_name["broken"]
    assert len(by_name["peer"]["samples"]) == len(by_name["ours"]["samples"]) == 5
    failed, fine = result["comparisons"]
    assert failed["error"] == "broken: RuntimeError: out of memory"
    assert {"ratio", "holds"}.isdisjoint(failed)
    assert fine["ratio"] == 2.0
    assert "Traceback" in capsys.readouterr().err


def test_the_garbage_collector_has_little_to_look_at_meanwhile() -> None:
    frozen = []
    track = Track()
    run(track, track.contestant("A", lambda _: float(frozen.append(gc.get_freeze_count()) or 1)))
    assert min(frozen) > 1000
    assert gc.get_freeze_count() == 0


def test_backends_and_operations_are_told() -> None:
    track = Track()
    costs = [9.0] * WARM_UP_ROUNDS + [2.0] * 5
    result = run(track, track.contestant("A", costs.__getitem__, flops=10, curve="A", length=3))
    (contestant,) = result["contestants"]
    assert contestant["backends"] == {"core": ["fast", "slow"]}
    assert (contestant["flops"], contestant["flops_per_second"]) == (10, 5.0)
    assert (contestant["curve"], contestant["length"]) == ("A", 3)
