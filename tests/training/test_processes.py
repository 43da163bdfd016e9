"""Real processes: killed with SIGKILL and started again, and two of them sharing a batch."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

from training import stage0, stage1
from training.run_record import MetricsFile

STAGE = "stage0_language"
TIMINGS = {"tokens_per_second", "seconds"}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in MetricsFile(folder).read()]


def words(data: Path, runs: Path, *extra: str) -> list[str]:
    return [toy_task.script(STAGE), *toy_task.stage_words(STAGE, data, runs), *extra]


def start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=toy_task.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_run_continues_to_the_same_result(tmp_path: Path) -> None:
    data = toy_task.write_data(tmp_path / "data")
    extra = ["--max_steps", "300", "--save_steps", "50", "--logging_steps", "20"]
    beside = start([sys.executable, *words(data, tmp_path / "straight", *extra)])
    straight, killed = tmp_path / "straight" / STAGE, tmp_path / "killed" / STAGE
    command = [sys.executable, *words(data, tmp_path / "killed", *extra)]
    process = start(command)
    # as soon as there is something to continue from
    while not list(killed.glob("checkpoints/step-*")) and process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert json.loads((killed / "run.json").read_text())["status"] == "running"
    assert not (killed / "config.json").exists()
    again = toy_task.launch(command[1:])
    assert again.returncode == 0, again.stderr
    assert "continuing from" in again.stdout
    assert beside.wait() == 0
    assert metrics(killed) == metrics(straight)
    ours, theirs = load_file(killed / "model.safetensors"), load_file(straight / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert (killed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    data = toy_task.write_data(tmp_path / "data")
    stage0.main(toy_task.stage_words(STAGE, data, tmp_path / "one"))
    distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    extra = ["--per_device_batch_size", "1", "--save_steps", "2"]
    done = toy_task.launch([*distributed, *words(data, tmp_path / "two", *extra)])
    assert done.returncode == 0, done.stderr
    assert "x 2 process(es)" in done.stdout
    assert done.stdout.count("=== stage0_language ===") == 1  # only one of them speaks
    assert json.loads((tmp_path / "two" / STAGE / "run.json").read_text())["world_size"] == 2
    alone, shared = metrics(tmp_path / "one" / STAGE), metrics(tmp_path / "two" / STAGE)
    assert len(alone) == len(shared) == 4
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    one = load_file(tmp_path / "one" / STAGE / "model.safetensors")
    for name, tensor in load_file(tmp_path / "two" / STAGE / "model.safetensors").items():
        assert tensor.allclose(one[name], atol=1e-4), name


def test_processes_of_which_one_has_no_image_go_on(tmp_path: Path) -> None:
    data, runs = toy_task.write_data(tmp_path / "data"), tmp_path / "runs"
    stage0.main(toy_task.stage_words("stage0_language", data, runs))
    stage0.main(toy_task.stage_words("stage0_vision", data, runs))
    captions = json.loads((data / "captions.json").read_text())
    texts = json.loads((data / "dialogues.json").read_text())
    (data / "captions.json").write_text(json.dumps([captions[0], texts[0]]))  # a step has one of each
    extra = ["--global_batch_size", "2", "--train", "projector", "vision_tower"]
    one, two = tmp_path / "one", tmp_path / "two"
    stage1.main([*toy_task.stage_words("stage1", data, runs), *extra, "--output_dir", str(one)])
    distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", toy_task.script("stage1")]
    done = toy_task.launch(
        [*distributed, *toy_task.stage_words("stage1", data, runs), *extra, "--output_dir", str(two)]
    )
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
