"""Asked to stop: a checkpoint at the next step boundary, a message of its own, and the same weights in the end."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import toy_task
from test_loop import make_loop, metrics, weights

from defocus_mllm.files import DiskFullError
from training import checkpointing, interruption
from training.batches import load_batches
from training.checkpointing import find_newest_valid, verify_checkpoint
from training.interruption import EXIT_STOPPED, SIGNALS, Interrupted, Interruption, elected, run_forwarding
from training.run_record import MetricsFile


def signalled_at(step: int, number: signal.Signals) -> Any:
    def after_step(done: int) -> None:
        if done == step:
            signal.raise_signal(number)

    return after_step


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_run_equals_straight_run(tmp_path: Path, number: signal.Signals, workers: int) -> None:
    torch.manual_seed(1)
    straight = make_loop(tmp_path / "straight", ema_decay=0.9)
    straight.run()
    torch.manual_seed(1)
    changes = {"ema_decay": 0.9, "dataloader_num_workers": workers}
    stopped = make_loop(tmp_path / "stopped", after_step=signalled_at(5, number), **changes)
    with stopped.interruption.listening(), pytest.raises(Interrupted, match=f"stopped by {number.name} after step 5"):
        stopped.run()
    checkpoint, _ = find_newest_valid(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-000005"  # although save_steps is 0
    resumed = make_loop(tmp_path / "stopped", **changes)
    assert resumed.resume(checkpoint) == []
    resumed.run()
    assert resumed.use_average()
    assert straight.use_average()
    expected = weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")


def test_what_is_on_disk_already_is_not_written_again(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, after_step=signalled_at(3, signal.SIGTERM), save_steps=3)
    with loop.interruption.listening(), pytest.raises(Interrupted):
        loop.run()
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    written = (checkpoint / "manifest.json").stat().st_mtime_ns
    again = make_loop(tmp_path, save_steps=3)
    again.resume(checkpoint)
    with again.interruption.listening():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            again.run()
    assert (checkpoint / "manifest.json").stat().st_mtime_ns == written


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    with loop.interruption.listening():
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Interrupted, match="after step 0"):
            loop.run()
    assert list(tmp_path.iterdir()) == []


def test_in_the_last_step_the_run_simply_ends(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, after_step=signalled_at(9, signal.SIGTERM))
    with loop.interruption.listening():
        loop.run()
    assert loop.step == loop.total_steps


def test_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption().listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_only_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.1, 10.2, 12.0, 12.0])
    monkeypatch.setattr(interruption.time, "monotonic", lambda: next(times))
    request = Interruption()
    with request.listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the launcher's copy of the first
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert elected(request.votes()) == "SIGINT"


def test_one_process_decides_for_all() -> None:
    assert elected([0, 0, 0]) == ""
    assert elected([0, 0, 2]) == "SIGUSR1"
    assert elected([1, 1, 0]) == "SIGTERM"


def test_processes_that_prepare_batches_outlive_a_signal() -> None:
    def load(keys: Any) -> dict[str, torch.Tensor]:
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        return {"keys": torch.tensor(keys)}

    loaded = [batch["keys"].item() for batch in load_batches(load, [[7], [8]], num_workers=1, pin_memory=False)]
    assert loaded == [7, 8]


def test_script_stops_with_a_message_and_an_exit_code_of_its_own(tmp_path: Path) -> None:
    """A real process; it is sent the signal when its first line of metrics is there."""
    data, stage = toy_task.write_data(tmp_path / "data"), "stage0_language"
    command = [toy_task.script(stage), *toy_task.stage_words(stage, data, tmp_path), "--max_steps", "2000"]
    run = tmp_path / stage
    process = subprocess.Popen(
        [sys.executable, *command],
        env=toy_task.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (run / "metrics.jsonl").exists() and process.poll() is None:
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == EXIT_STOPPED, output
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["stopped_by"]) == ("interrupted", "SIGTERM")
    step = record["step"]
    assert 0 < step < 2000
    assert (
        f"{stage}: stopped by SIGTERM after step {step} of 2,000; saved in {run}; the same command continues" in output
    )
    assert "Traceback" not in output
    verify_checkpoint(run / "checkpoints" / f"step-{step:06d}")
    assert not (run / "config.json").exists()


def test_waiting_passes_signals_on() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert run_forwarding(["sleep", "60"]) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_full_disk_while_saving_loses_nothing_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    straight = make_loop(tmp_path / "straight", save_steps=3)
    straight.run()
    torch.manual_seed(1)
    full = make_loop(tmp_path / "full", save_steps=3, save_total_limit=1)
    save = torch.save

    def write(state: Any, path: Path) -> None:
        save(state, path)
        if "step-000006" in str(path):  # half of what it wrote is there
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpointing.torch, "save", write)
    with pytest.raises(DiskFullError, match=r"step-000006; nothing older was lost"):
        full.run()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-000003"]
    checkpoint, warnings = find_newest_valid(tmp_path / "full" / "checkpoints")
    assert checkpoint is not None
    assert warnings == []
    resumed = make_loop(tmp_path / "full", save_steps=3)
    resumed.resume(checkpoint)
    resumed.run()
    expected = weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    assert metrics(tmp_path / "full") == metrics(tmp_path / "straight")


def test_a_full_disk_while_logging_says_so(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.path.symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl.*free some space"):
        file.append({"step": 1})
