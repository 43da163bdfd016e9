"""Steps that are not finite: skipped by all processes alike, counted, and kept whole where they end a run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import toy_task
from test_loop import compute_loss, make_loop, make_stage, metrics, weights

from training import replay, stage0
from training.arguments import CommonArguments
from training.engine import NonFiniteLossError


def poisoned_stage(calls: set[int], value: float = float("nan")) -> Any:
    """The toy stage, whose loss is not finite in the calls named, counted from 1."""
    stage, count = make_stage(dropout=0.0), 0

    def poisoned(forward: Any, batch: Any, items: int) -> torch.Tensor:
        nonlocal count
        count += 1
        return compute_loss(forward, batch, items) * (value if count in calls else 1.0)

    stage.compute_loss = poisoned
    return stage


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_skipped_and_counted(tmp_path: Path, value: float) -> None:
    loop = make_loop(tmp_path, poisoned_stage({4, 5}, value), max_nonfinite_steps=2, logging_steps=1, ema_decay=0.9)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    averages: dict[int, torch.Tensor] = {}

    def remember(step: int) -> None:
        seen[step], averages[step] = weights(loop), loop.average[0].clone()

    loop.after_step = remember
    loop.run()
    assert loop.guard.skipped == 2
    assert all(torch.equal(seen[5][name], tensor) for name, tensor in seen[3].items())
    assert torch.equal(averages[5], averages[3])
    assert not all(torch.equal(seen[6][name], tensor) for name, tensor in seen[5].items())
    lines = metrics(tmp_path)
    assert [line["nonfinite_steps"] for line in lines] == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert ["loss" in line for line in lines] == [True, True, True, False, False, True, True, True, True]


def test_a_line_of_several_steps_is_about_those_that_were_taken(tmp_path: Path) -> None:
    make_loop(tmp_path / "with", poisoned_stage({4}), max_nonfinite_steps=1, max_steps=4, logging_steps=4).run()
    make_loop(tmp_path / "without", make_stage(dropout=0.0), max_steps=4, logging_steps=1).run()
    (line,) = metrics(tmp_path / "with")
    first_three = [line["loss"] for line in metrics(tmp_path / "without")[:3]]
    assert line["loss"] == pytest.approx(sum(first_three) / 3)


def test_too_many_in_a_row_end_the_run_and_single_ones_do_not(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "single", poisoned_stage({2, 4, 6, 8}), max_nonfinite_steps=1)
    loop.run()
    assert loop.guard.skipped == 4
    loop = make_loop(tmp_path / "row", poisoned_stage({4, 5}), max_nonfinite_steps=1)
    with pytest.raises(NonFiniteLossError, match=r"toy: loss nan .* at step 5.*training\.replay .*step-000005"):
        loop.run()


def test_a_resumed_run_knows_how_many_there_were(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, poisoned_stage({3}), max_nonfinite_steps=1, save_steps=3, max_steps=3)
    loop.run()
    again = make_loop(tmp_path, make_stage(), max_nonfinite_steps=1)
    again.resume(tmp_path / "checkpoints" / "step-000003")
    assert again.guard.state() == [1, 1]


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_nonfinite_steps: must not be negative"):
        CommonArguments(output_dir="out", max_nonfinite_steps=-1)


def run_that_ends(tmp_path: Path, extra: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """(folder of the step, message) of a real stage whose gradients go wrong in its third step."""
    data, norms = toy_task.write_data(tmp_path / "data"), 0
    clip = torch.nn.utils.clip_grad_norm_

    def spoiled(*given: Any, **options: Any) -> torch.Tensor:
        nonlocal norms
        norms += 1
        return clip(*given, **options) * (float("nan") if norms == 3 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    with pytest.raises(NonFiniteLossError) as caught:
        stage0.main([*toy_task.stage_words("stage0_language", data, tmp_path / "runs"), *extra])
    found = re.search(r"training\.replay (\S+)", str(caught.value))
    assert found
    return Path(found[1]), str(caught.value)


def test_what_ended_a_run_is_kept_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run_that_ends(tmp_path, ["--per_device_batch_size", "2"], monkeypatch)
    run = json.loads((folder.parents[1] / "run.json").read_text())
    assert (run["status"], run["step"], run["nonfinite_steps"]) == ("failed", 2, 1)
    assert not [path for path in folder.iterdir() if path.suffix in (".pt", ".bin", ".pkl")]
    record = json.loads((folder / "nonfinite.json").read_text())
    assert record["gradient_norm"] == "nan"
    capsys.readouterr()
    replay.main([str(folder), "--cpu", "true"])
    shown = capsys.readouterr().out
    assert shown.count("micro-batch") == 2
    assert float(shown.split()[-1]) == pytest.approx(float(record["loss"]), rel=1e-5)
    assert "not finite" not in shown

    name = "model.layers.1.mlp.down_proj.weight"
    saved = load_file(folder / "model.safetensors")
    save_file({**saved, name: saved[name] * float("nan")}, folder / "model.safetensors", {"format": "pt"})
    replay.main([str(folder), "--cpu", "true"])
    shown = capsys.readouterr().out
    assert f"not finite: weights {name}" in shown
    assert "not finite: the output of model.layers.1.mlp.down_proj" in shown
    assert "not finite: the gradient of" in shown


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no nonfinite\.json"):
        replay.main([str(tmp_path)])
    (tmp_path / "nonfinite.json").write_text('{"stage": "stage2", "world_size": 1')
    with pytest.raises(ValueError, match="not valid JSON"):
        replay.main([str(tmp_path)])
    with pytest.raises(ValueError, match=r"batch-0\.safetensors is missing or damaged"):
        replay.read_batches(tmp_path / "batch-0.safetensors")


TWO_PROCESSES = """
import sys, torch
from accelerate import Accelerator
from training.nonfinite import NonFiniteGuard
accelerator = Accelerator(cpu=True)
guard = NonFiniteGuard(accelerator, 2)
bad = float("nan") if accelerator.process_index == 1 else 0.25
told = [guard.allows(torch.tensor(loss), torch.tensor(1.0)) for loss in (0.5, bad, 0.5)]
worst = float("nan") if guard.worst[0] != guard.worst[0] else guard.worst[0]
rank = accelerator.process_index
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    print(told, guard.state(), worst, guard.worst[1], file=file)
"""


def test_processes_decide_alike(tmp_path: Path) -> None:
    script = tmp_path / "guard.py"
    script.write_text(TWO_PROCESSES)
    done = toy_task.launch(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    )
    assert done.returncode == 0, done.stderr
    said = {(tmp_path / rank).read_text() for rank in "01"}
    assert said == {"[True, False, True] [1, 0] nan 1.0\n"}
