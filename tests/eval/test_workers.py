"""More processes: the same answers, also after kill -9 and with another number of them."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.generator import TransformersGenerator
from eval.registry import Benchmark, get_benchmark
from eval.run import evaluate
from eval.workers import WorkerLostError, Workers
from tests.eval.fake_generator import FakeGenerator, SlowGenerator

REPOSITORY = Path(__file__).parents[2]
QUESTIONS = 40


def samples_of(folder: Path) -> list[dict]:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "secs"} for line in lines]


def metrics_of(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text())
    return {name: results[name] for name in ("run_id", "partial", "metrics", "partial_metrics", "breakdown")}


def test_workers_share_the_batches_and_change_nothing(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    alone = evaluate(benchmark, FakeGenerator(), tmp_path / "alone", data_root)
    own = SlowGenerator(0.2)
    with Workers(functools.partial(SlowGenerator.of_process, 0.0, None), 1) as workers:
        together = evaluate(benchmark, own, tmp_path / "together", data_root, batch_size=4, workers=workers)
    assert together == alone
    assert 0 < len(own.batches) < 15
    assert samples_of(tmp_path / "together" / "easy_vqa") == samples_of(tmp_path / "alone" / "easy_vqa")


def test_an_error_in_a_worker_ends_the_run(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    with (
        Workers(functools.partial(SlowGenerator.of_process, 0.0, 0), 1) as workers,
        pytest.raises(RuntimeError, match="killed"),
    ):
        evaluate(benchmark, SlowGenerator(0.5), tmp_path, data_root, batch_size=4, workers=workers)
    assert not (tmp_path / "easy_vqa" / "results.json").exists()


class Ends(SlowGenerator):
    """Its process is killed, its weights are missing, or it takes an hour."""

    @classmethod
    def how(cls, way: str, number: int) -> Ends:
        if way == "missing":
            raise ValueError("--model: a worker's weights are missing")
        generator = cls(0.0)
        generator.way = way
        return generator

    def generate(self, requests, max_new_tokens):
        if self.way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)


class Interrupted(SlowGenerator):
    """The user presses Ctrl-C as soon as a worker has begun."""

    def generate(self, requests, max_new_tokens):
        if len(self.batches) == 4:
            raise KeyboardInterrupt
        return super().generate(requests, max_new_tokens)


@pytest.mark.parametrize(
    ("way", "kind", "message"),
    [
        ("killed", WorkerLostError, "a process of --processes ended before its batch was answered"),
        ("missing", ValueError, "--model: a worker's weights are missing"),
        ("slow", KeyboardInterrupt, None),
    ],
)
def test_what_ends_a_worker_ends_the_run_at_once(
    way: str, kind: type[BaseException], message: str | None, benchmark: Benchmark, data_root: Path, tmp_path: Path
) -> None:
    own = Interrupted(2.0) if way == "slow" else SlowGenerator(1.0)
    with pytest.raises(kind, match=message), Workers(functools.partial(Ends.how, way), 1) as workers:
        evaluate(benchmark, own, tmp_path, data_root, batch_size=2, workers=workers)
    assert answers_in(tmp_path / "easy_vqa" / "predictions.jsonl") > 0, "the own answers are kept"


def test_two_runs_do_not_write_one_journal(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    class Nested(FakeGenerator):
        def generate(self, requests, max_new_tokens):
            with pytest.raises(ValueError, match="another run is writing here"):
                evaluate(benchmark, FakeGenerator(), tmp_path, data_root)
            return super().generate(requests, max_new_tokens)

    evaluate(benchmark, Nested(), tmp_path, data_root)


def start(model_dir: Path, output: Path, processes: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "eval.run", "--model", model_dir, "--benchmarks", "easy_vqa", "--output", output]
    options = ["--limit", QUESTIONS, "--batch-size", 2, "--processes", processes, "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, command), *map(str, options)], cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL
    )


def answers_in(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def kill_after_first_answers(process: subprocess.Popen, journal: Path, before: int) -> int:
    """Kill -9 as soon as there are more answers on disk than `before`; how many there are then."""
    deadline = time.monotonic() + 240
    while answers_in(journal) == before:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no answer in four minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return answers_in(journal)


@pytest.mark.timeout(600)
def test_kill_9_and_restart_with_another_number_of_processes(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    easy_vqa, generator = get_benchmark("easy_vqa"), TransformersGenerator(model_dir, "cpu")
    evaluate(easy_vqa, generator, tmp_path / "straight", limit=QUESTIONS)
    straight, killed = (tmp_path / name / "easy_vqa" for name in ("straight", "killed"))
    journal, answered = killed / "predictions.jsonl", 0
    for processes in (1, 2):
        now = kill_after_first_answers(start(model_dir, tmp_path / "killed", processes), journal, answered)
        assert answered < now < QUESTIONS
        assert not (killed / "results.json").exists()
        answered = now
    evaluate(easy_vqa, generator, tmp_path / "killed", limit=QUESTIONS)
    assert json.loads((killed / "results.json").read_text())["health"]["resumed"] == answered
    assert samples_of(killed) == samples_of(straight)
    assert metrics_of(killed) == metrics_of(straight)
