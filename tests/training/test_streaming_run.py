"""Stage 0 on a stream, through its script: resumed equals straight, workers and bad rows, and what it asks for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from training import stage0
from training.loop import TrainingLoop
from training.run_record import MetricsFile

sys.path.insert(0, str(Path(__file__).parent))
import toy_task
from picture_rows import encoded, table

pytestmark = pytest.mark.usefixtures("datasets_cache")
TIMINGS = {"images_per_second", "seconds"}
STREAM = ["--streaming", "true", "--shuffle_buffer", "5", "--mixup", "0.2", "--drop_path_rate", "0.3"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """11 usable rows of 13 in groups of 3; the picture of another one is damaged."""
    labels = [row % 3 if row not in (4, 9) else None for row in range(13)]
    broken = {"bytes": encoded(0)[:45], "path": "broken.png"}
    table(labels, row6=broken).to_parquet(tmp_path / "pets.parquet", batch_size=3)
    return tmp_path / "pets.parquet"


def run(data: Path, folder: Path, *extra: str) -> Path:
    words = toy_task.stage_words("stage0_vision", data, folder)
    stage0.main([*words, "--data", str(data), *STREAM, "--on_bad_sample", "skip", *extra])
    return folder / "stage0_vision"


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in MetricsFile(folder).read()]


def test_resumed_equals_straight(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--num_samples", "11", "--max_steps", "7", "--per_device_batch_size", "2", "--save_steps", "2"]
    straight = run(data, tmp_path / "straight", *words)

    take_step = TrainingLoop._take_step

    def stop_after_five(loop: TrainingLoop, batches: Any) -> None:
        if loop.step == 5:
            raise KeyboardInterrupt
        take_step(loop, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_take_step", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "stopped", *words)
    # workers may be added on the way
    resumed = run(data, tmp_path / "stopped", *words, "--dataloader_num_workers", "2")
    ours, theirs = load_file(resumed / "model.safetensors"), load_file(straight / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert metrics(resumed) == metrics(straight)
    record = json.loads((straight / "run.json").read_text())
    # 28 samples are two and a half passes; one picture and two labels of each are bad
    assert record["skipped"]["unreadable"] in (2, 3)
    assert record["skipped"]["bad label"] in (4, 5, 6)
    assert record["num_samples"] == 11


def test_the_first_row_is_shown_and_a_bad_one_ends_the_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, tmp_path, "--dry_run", "true")
    assert "pets.parquet[0]: 8 x 6 pixels, 0 of ['dog', 'cat', 'none']" in capsys.readouterr().out
    for workers in ("0", "1"):
        with pytest.raises(ValueError, match=r"pets\.parquet\[[496]\]: ") as caught:
            run(data, tmp_path, "--on_bad_sample", "raise", "--dataloader_num_workers", workers)
        assert "\n" not in str(caught.value)


def test_a_stream_validates_on_held_images(data: Path, tmp_path: Path) -> None:
    folder = run(data, tmp_path, "--validation_data", str(data), "--max_steps", "1")
    assert json.loads((folder / "run.json").read_text())["validation"]["validation_samples"] == 10


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max_steps", "-1"], "give num_samples or max_steps"),
        (["--streaming", "false", "--num_samples", "3"], "num_samples: only for a stream"),
        (["--streaming", "false", "--num_labels", "3"], "num_labels: only for a stream"),
        (["--repeated_augmentation", "2"], "repeated_augmentation: must be 1 for a stream"),
        (["--shuffle_buffer", "-1"], "shuffle_buffer: must not be negative"),
        (["--label_column", "class"], "no column 'class'; it has image, label; name one with --label_column"),
    ],
)
def test_what_a_stream_needs_is_named(data: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "runs", *extra)
    assert not (tmp_path / "runs" / "stage0_vision").exists()
