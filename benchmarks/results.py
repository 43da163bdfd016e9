"""What `results.json` holds: every measurement, which claims it keeps, and what made it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sampling import KERNEL_VARIABLE
from benchmarks.shows import SHOWS
from benchmarks.suites import Benchmark, benchmarks_of
from defocus_mllm.provenance import commit, hardware, versions

SCHEMA_VERSION = 1


def begin(suite: str, toy: bool, repeats: int, seed: int, command: str) -> dict[str, Any]:
    """The results of a run that has measured nothing yet; every benchmark of its suite is there as "not run"."""
    revision = commit(Path(__file__).parent)
    benchmarks = benchmarks_of(suite)
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": suite,
        "toy": toy,
        "complete": False,
        "started": now(),
        "command": command,
        "commit": revision and revision.partition("+")[0],
        "dirty": revision and revision.endswith("+changes"),
        "seed": seed,
        "repeats": repeats,
        "forced_kernel": os.environ.get(KERNEL_VARIABLE),
        "hardware": hardware(),
        "versions": versions(),
        "benchmarks": [
            {"name": benchmark.name, "description": benchmark.description, "status": "not run", "races": []}
            for benchmark in benchmarks
        ],
        "claims": [_claim(name, "not run", []) for benchmark in benchmarks for name in benchmark.shows],
    }


def add(results: dict[str, Any], benchmark: Benchmark, races: Sequence[dict[str, Any]], seconds: float) -> None:
    """Enter what a benchmark measured, and judge its claims."""
    outcome = {"status": "ok", "seconds": round(seconds, 1), "races": list(races)}
    if any(errors_of(outcome)):
        outcome["status"] = "failed"
    _enter(results, benchmark, outcome)


def add_failure(results: dict[str, Any], benchmark: Benchmark, error: str, seconds: float) -> None:
    """Enter that a benchmark as a whole came to no result."""
    _enter(results, benchmark, {"status": "failed", "seconds": round(seconds, 1), "error": error, "races": []})


def _enter(results: dict[str, Any], benchmark: Benchmark, outcome: dict[str, Any]) -> None:
    (entry,) = (entry for entry in results["benchmarks"] if entry["name"] == benchmark.name)
    entry |= outcome
    comparisons = [row for race in entry["races"] for row in race.get("comparisons", [])]
    judged = {name: _claim(name, entry["status"], comparisons) for name in benchmark.shows}
    results["claims"] = [judged.get(claim["name"], claim) for claim in results["claims"]]
    results["complete"] = all(entry["status"] != "not run" for entry in results["benchmarks"])
    results["finished"] = now()


def errors_of(benchmark: Mapping[str, Any]) -> Iterator[str]:
    """What went wrong in a benchmark of `results.json`, a line each."""
    if "error" in benchmark:
        yield benchmark["error"]
    for race in benchmark["races"]:
        if "error" in race:
            yield f"{race['title']}: {race['error']}"
        for contestant in race.get("contestants", []):
            if "error" in contestant:
                yield f"{race['title']}: {contestant['name']}: {contestant['error']}"


def _claim(name: str, status: str, comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A claim with the worst ratio among its comparisons; one that lacks a comparison is never held."""
    show = SHOWS[name]
    claim: dict[str, Any] = {"name": name, **show.describe()}
    mine = [row for row in comparisons if row["show"] == name]
    judged = [row["measured"] for row in mine if "holds" in row]
    if judged:
        claim["measured"] = max(judged) if show.kind == "cost" else min(judged)
    if any("error" in row for row in mine) or (status == "failed" and not judged):
        return {**claim, "verdict": "failed"}
    if not judged:
        return {**claim, "verdict": "not run" if status == "not run" else "not measured"}
    return {**claim, "verdict": "held" if all(row["holds"] for row in mine) else "missed"}


def now() -> str:
    """The time, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
