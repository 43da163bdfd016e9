"""Trackers get what metrics.jsonl gets, and the arguments; one that is not there is an error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

from training import stage0
from training.run_record import MetricsFile


class Recorder(GeneralTracker):
    """Stands for TensorBoard."""

    name = "tensorboard"
    requires_logging_directory = True
    seen: ClassVar[list[Any]] = []

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.seen.append(("begin", run_name, str(logging_dir)))

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.seen.append(("config", values))

    def log(self, values: dict[str, Any], step: int | None, **options: Any) -> None:
        self.seen.append((step, values))

    def finish(self) -> None:
        self.seen.append(("finish",))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setattr(Recorder, "seen", [])
    return Recorder.seen


def test_trackers_get_what_the_file_gets(tmp_path: Path, recorder: list[Any]) -> None:
    words = toy_task.stage_words("stage0_language", toy_task.write_data(tmp_path / "data"), tmp_path / "runs")
    stage0.main([*words, "--report_to", "tensorboard"])
    begin, config, *lines, end = recorder
    folder = tmp_path / "runs" / "stage0_language"
    assert begin == ("begin", "defocus-mllm", str(folder))
    assert config[1]["learning_rate"] == 1e-2
    assert all(isinstance(value, (str, int, float)) for value in config[1].values())
    assert [step for step, _ in lines] == [1, 2, 3, 4]
    assert [values for _, values in lines] == MetricsFile(folder).read()
    assert end == ("finish",)


def test_trackers_end_with_a_run_that_fails(
    tmp_path: Path, recorder: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr("training.loop.TrainingLoop.run", fail)
    words = toy_task.stage_words("stage0_language", toy_task.write_data(tmp_path / "data"), tmp_path / "runs")
    with pytest.raises(ValueError, match="on purpose"):
        stage0.main([*words, "--report_to", "tensorboard"])
    assert recorder[-1] == ("finish",)


@pytest.mark.parametrize(
    ("name", "message"), [("tensorbord", "unknown tracker 'tensorbord'"), ("wandb", "wandb is not installed")]
)
def test_a_tracker_that_is_not_there_is_named(tmp_path: Path, recorder: list[Any], name: str, message: str) -> None:
    words = toy_task.stage_words("stage0_language", tmp_path, tmp_path / "runs")
    with pytest.raises(ValueError, match=message):
        stage0.main([*words, "--report_to", name])
    assert not (tmp_path / "runs").exists()
