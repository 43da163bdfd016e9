"""The command: what it writes, what it refuses, and that neither a miss nor a failure is hidden."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.isolation import IsolatedError
from benchmarks.races import Comparison, Contestant, Race, Rules, run_race
from benchmarks.run import argument_parser, chosen, main
from benchmarks.sampling import Sample
from benchmarks.suites import benchmarks_of

ROOT = Path(__file__).parents[2]

# name -> costs of (ours, peer), in seconds, and the claim they are judged by
COSTS = {
    "attention": (1.2, 1.0, "attention_short"),
    "encoders": (1.2, 1.0, "vit_forward"),
    "growth": (1.1, 1.0, "growth_retention"),
}


def constant(name: str, cost: float, **facts: Any) -> Contestant:
    return Contestant(name, lambda: Sample(cost, {"attention": ["folded"]}), **facts)


def fake_races(benchmark: str, **_: Any) -> list[dict[str, Any]]:
    """One race whose contestants cost what `COSTS` says."""
    ours, peer, show = COSTS[benchmark]
    contestants = [
        constant("De-focus", ours, curve="De-focus", length=10, flops=10**9),
        constant("peer", peer, curve="peer", length=20, flops=10**9),
    ]
    race = Race(f"{benchmark} race", lambda: contestants, [Comparison("De-focus", "peer", show)], {"batch": 4})
    return [{**run_race(race, Rules(5, seconds=0)), "device": "cpu", "dtype": "float32", "threads": 2}]


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Benchmarks do not run; `fake_races` answers in their place."""
    monkeypatch.setattr("benchmarks.run.isolated", lambda _, **arguments: fake_races(**arguments))
    return fake_races


def run(output: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    code = main(["--suite", "cpu", "--output", str(output), *words])
    return code, json.loads((output / "results.json").read_text()), (output / "results.md").read_text()


@pytest.mark.usefixtures("isolated")
def test_kept_and_missed_limits_stand_in_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, results, page = run(tmp_path / "speed", "--only", "attention", "encoders")
    assert code == 0, "a missed limit is a result"
    verdicts = {claim["name"]: claim["verdict"] for claim in results["claims"]}
    assert verdicts["attention_short"] == "held"
    assert verdicts["vit_forward"] == "missed"
    assert verdicts["attention_long"] == "not measured"
    assert verdicts["mamba_memory"] == "not run"
    assert "at most 1.25x plain causal SDPA | 1.2x | at most 1.25x | held |" in page
    assert "De-focus ViT, forward: at most 1.05x CLIPVisionModel | 1.2x | at most 1.05x | **missed** |" in page
    assert "| 1.200 | at most 1.05x: **missed** |" in page
    assert "1.2 s (min 1.2 s, IQR 0 µs, attention folded)" in page
    assert "missed  De-focus ViT, forward" in capsys.readouterr().out


@pytest.mark.usefixtures("isolated")
def test_what_made_the_results_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFOCUS_KERNEL", "reference")
    _, results, page = run(tmp_path / "speed", "--only", "growth", "--seed", "3", "--repeats", "7")
    assert (results["seed"], results["repeats"], results["suite"], results["toy"]) == (3, 7, "cpu", False)
    assert results["command"].startswith("python -m benchmarks.run --suite cpu --output ")
    assert results["versions"]["torch"] == torch.__version__
    assert results["hardware"]["threads"] == torch.get_num_threads()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert results["commit"] == (head or None)
    assert results["dirty"] in ((True, False) if head else (None,))
    assert results["forced_kernel"] == "reference"
    assert "`DEFOCUS_KERNEL=reference` was set" in page
    (race,) = next(entry for entry in results["benchmarks"] if entry["name"] == "growth")["races"]
    assert (race["shapes"], race["dtype"], race["threads"]) == ({"batch": 4}, "float32", 2)
    assert [contestant["samples"] for contestant in race["contestants"]] == [[1.1] * 5, [1.0] * 5]
    assert race["contestants"][0]["backends"] == {"attention": ["folded"]}


@pytest.mark.usefixtures("isolated")
def test_a_run_of_some_benchmarks_is_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, results, page = run(tmp_path / "some", "--only", "growth")
    assert not results["complete"]
    assert "**Partial" in page
    monkeypatch.setattr("benchmarks.run.isolated", lambda _, **__: [])
    _, results, page = run(tmp_path / "all")
    assert results["complete"]
    assert "**Partial" not in page


@pytest.mark.usefixtures("isolated")
def test_curves_are_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    _, _, page = run(tmp_path / "speed", "--only", "growth", "attention")
    drawing = (tmp_path / "speed" / "results.svg").read_text()
    assert drawing.startswith("<?xml")
    assert "results.svg" in page


@pytest.mark.usefixtures("isolated")
def test_without_matplotlib_only_the_figure_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    code, _, page = run(tmp_path / "speed", "--only", "growth")
    assert code == 0
    assert "no figure: matplotlib is not installed (pip install 'defocus-mllm[benchmarks]')" in capsys.readouterr().out
    assert "results.svg" not in page
    assert not (tmp_path / "speed" / "results.svg").exists()


def test_a_benchmark_that_dies_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def isolated(_: object, benchmark: str, **arguments: Any) -> list[dict[str, Any]]:
        if benchmark == "attention":
            raise IsolatedError("its process was killed by signal 9")
        return fake_races(benchmark)

    monkeypatch.setattr("benchmarks.run.isolated", isolated)
    code, results, page = run(tmp_path / "speed", "--only", "attention", "growth")
    assert code == 1
    status = {entry["name"]: entry["status"] for entry in results["benchmarks"]}
    assert (status["attention"], status["growth"], status["memory"]) == ("failed", "ok", "not run")
    verdicts = {claim["name"]: claim["verdict"] for claim in results["claims"]}
    assert (verdicts["attention_short"], verdicts["growth_retention"]) == ("failed", "held")
    assert "**Failed:** its process was killed by signal 9" in page
    assert "FAILED  attention: its process was killed by signal 9" in capsys.readouterr().out


def test_a_measurement_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample() -> Sample:
        raise RuntimeError("no memory")

    def isolated(_: object, benchmark: str, **arguments: Any) -> list[dict[str, Any]]:
        contestants = [constant("De-focus", 1.0), Contestant("peer", sample)]
        race = Race("broken race", lambda: contestants, [Comparison("De-focus", "peer", COSTS[benchmark][2])])
        facts = {"device": "cpu", "dtype": "float32", "threads": 2}
        return [*fake_races(benchmark), {**run_race(race, Rules(5, seconds=0)), **facts}]

    monkeypatch.setattr("benchmarks.run.isolated", isolated)
    code, results, page = run(tmp_path / "speed", "--only", "attention")
    assert code == 1
    claim = next(claim for claim in results["claims"] if claim["name"] == "attention_short")
    assert claim["verdict"] == "failed", "one of its comparisons held, the other one could not be made"
    assert "broken race: peer: RuntimeError: no memory" in page
    assert "| peer: failed | **failed** |" in page


def test_a_race_that_cannot_begin_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "benchmarks.run.isolated", lambda _, **__: [{"title": "a race", "error": "ValueError: no such model"}]
    )
    code, results, page = run(tmp_path / "speed", "--only", "growth")
    assert code == 1
    assert "**Failed:** a race: ValueError: no such model" in page
    assert {claim["verdict"] for claim in results["claims"] if claim["name"].startswith("growth")} == {"failed"}


@pytest.mark.usefixtures("isolated")
def test_files_of_another_name_refer_to_each_other(tmp_path: Path) -> None:
    assert main(["--suite", "cpu", "--output", str(tmp_path), "--name", "speed", "--only", "growth"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md", "speed.svg"]
    page = (tmp_path / "speed.md").read_text()
    assert "(speed.svg)" in page
    assert "[json](speed.json)" in page


@pytest.mark.usefixtures("isolated")
def test_results_are_never_replaced(tmp_path: Path) -> None:
    run(tmp_path, "--only", "growth")
    with pytest.raises(FileExistsError, match=r"results.json exists already"):
        run(tmp_path, "--only", "growth")


def test_an_unknown_benchmark_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="--only: suite cpu has no benchmark 'encoder'; did you mean 'encoders'"):
        chosen("cpu", ["encoder"])
    with pytest.raises(ValueError, match="suite cpu has no benchmark 'stage2'"):
        chosen("cpu", ["stage2"])
    assert [benchmark.name for benchmark in chosen("gpu", ["stage2", "attention"])] == ["attention", "stage2"]


def test_fewer_than_five_repeats_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--suite", "cpu", "--output", str(tmp_path), "--repeats", "4"])
    assert "must be at least 5, not 4" in capsys.readouterr().err


def test_an_output_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--suite", "cpu"])
    assert "--output" in capsys.readouterr().err


@pytest.mark.usefixtures("isolated")
def test_the_suite_of_a_gpu_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--suite gpu needs a CUDA device and PyTorch sees none; --toy"):
        main(["--suite", "gpu", "--output", str(tmp_path / "speed")])
    assert not (tmp_path / "speed").exists()
    assert main(["--suite", "gpu", "--toy", "--output", str(tmp_path / "toy"), "--only", "growth"]) == 0
    page = (tmp_path / "toy" / "results.md").read_text()
    assert "**Toy sizes" in page
    assert "The limits were set for 2 CPU cores" in page


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_the_list_names_every_benchmark_and_claim(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", suite, "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{benchmark.name}: {benchmark.description}" in listed for benchmark in benchmarks_of(suite))
    assert ("stage2" in listed) is (suite == "gpu")
    assert "De-focus ViT, forward: at most 1.05x CLIPVisionModel" in listed


def test_documented_commands_parse() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m benchmarks\.run (.*?)(?:#.*)?$", text, re.MULTILINE)
    assert len(commands) > 2
    for command in commands:
        arguments = argument_parser().parse_args(shlex.split(command))
        chosen(arguments.suite, arguments.only)


def test_the_command_ends_with_one_line_for_a_user_s_mistake() -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--suite", "cpu", "--only", "speed", "--list"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1].startswith("error: --only: suite cpu has no benchmark 'speed'")
