"""Real processes killed with SIGKILL and started again, in small; and that the test would see what it looks for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_loop import make_loop

from training import kill_test
from training.run_record import RunRecord


def test_killed_twice_and_nothing_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "resume.json"
    words = ["--kills", "2", "--steps", "24", "--save_steps", "3", "--output", str(output)]
    assert kill_test.main(words) == 0, capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["held"]
    assert len(result["kills"]) == sum(result["moments"].values()) == 2
    assert output.with_suffix(".md").read_text().count("\n| ") >= 2 + 2
    assert "2 kills (" in capsys.readouterr().out


def finished(folder: Path) -> Path:
    """A finished toy run with checkpoints after steps 3, 6 and 9."""
    loop = make_loop(folder, save_steps=3, save_total_limit=0, logging_steps=1, ema_decay=0.9)
    loop.run()
    loop.stage.model.save_pretrained(folder)  # type: ignore[operator]
    RunRecord.start("toy", loop.arguments, {}, 1).finish("complete")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    pair = []
    for name in ("straight", "killed"):
        torch.manual_seed(1)
        pair.append(finished(folder / name))
    return pair[0], pair[1]


def test_equal_runs_have_no_differences(runs: tuple[Path, Path]) -> None:
    assert kill_test.differences(*runs) == []


@pytest.mark.parametrize("damage", ["weights", "metrics", "status", "state", "checkpoint"])
def test_every_difference_is_seen(runs: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    straight, killed = runs
    copy = tmp_path / "copy"

    shutil.copytree(killed, copy)
    if damage == "weights":
        content = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "metrics":
        lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
        (copy / "metrics.jsonl").write_text("".join(lines[:4] + lines[5:]))
    elif damage == "status":
        (copy / "run.json").write_text((copy / "run.json").read_text().replace('"complete"', '"running"'))
    elif damage == "state":
        path = copy / "checkpoints" / "step-000006" / "training_state.pt"
        state = torch.load(path)
        next(iter(state["average"])).view(-1)[0].add_(1e-7)
        torch.save(state, path)
    else:
        shutil.rmtree(copy / "checkpoints" / "step-000009")
    (problem,) = kill_test.differences(straight, copy)
    assert {"state": "step-000006"}.get(damage, damage) in problem or damage == "status"


@pytest.mark.parametrize("damage", ["none", "torn line", "flipped", "lost line"])
def test_what_a_kill_leaves_is_judged(runs: tuple[Path, Path], tmp_path: Path, damage: str) -> None:

    copy = shutil.copytree(runs[0], tmp_path / "copy")
    metrics = copy / "metrics.jsonl"
    if damage == "torn line":
        metrics.write_text(metrics.read_text() + '{"step": 10, "lo')
    elif damage == "flipped":
        weights = copy / "checkpoints" / "step-000006" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    elif damage == "lost line":
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    problems: list[str] = []
    found = kill_test.inspect(copy, problems)
    assert found["newest_checkpoint"] == 9
    assert found["torn_line"] == (damage == "torn line")
    assert len(problems) == (damage in ("flipped", "lost line")), problems
