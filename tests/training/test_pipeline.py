"""The pipeline: commands it would run, what it skips, what it says at the end. The real run is CI's miniature."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from training import pipeline
from training.files import fingerprint
from training.interruption import EXIT_STOPPED
from training.run_record import RunRecord

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
QUICKSTART = str(RECIPES / "easy_vqa.yaml")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were started; none really is."""
    started: list[list[str]] = []

    def record(words: list[str]) -> int:
        started.append(words)
        return 3 if "training.stage1" in words and "fail" in str(words) else 0

    monkeypatch.setattr(pipeline, "run_forwarding", record)
    return started


def test_commands_in_order(tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.main(["--config", QUICKSTART, "--output_dir", str(tmp_path), "--data_dir", "d", "--seed", "4"])
    modules = [words[2] for words in commands]
    assert modules == [
        "training.prepare_easy_vqa",
        *("training.stage0", "training.stage0", "training.stage1", "training.stage2"),
        *("eval.run", "eval.report"),
    ]
    assert all(words[0] == sys.executable for words in commands)
    stage2 = commands[4]
    assert stage2[stage2.index("--seed") + 1] == "4"
    assert stage2[stage2.index("--model") + 1] == str(tmp_path / "stage1")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(printed) == len(commands)  # each command was shown
    assert printed[4].startswith("$ python -m training.stage2 --config")


def test_miniature_limits_the_evaluation(tmp_path: Path) -> None:
    arguments = pipeline.PipelineArguments(output_dir=str(tmp_path), cpu=True)
    steps = pipeline.plan(str(RECIPES / "easy_vqa_miniature.yaml"), arguments)
    evaluation = steps[-2].words
    assert evaluation[evaluation.index("--limit") + 1] == "200"
    assert evaluation[evaluation.index("--device") + 1] == "cpu"
    assert all("--cpu" in step.words for step in steps[1:5])


def test_failing_command_stops_the_pipeline(tmp_path: Path, commands: list[list[str]]) -> None:
    with pytest.raises(pipeline.StepError, match="'stage1' failed with exit code 3"):
        pipeline.main(["--config", QUICKSTART, "--output_dir", str(tmp_path / "fail")])
    assert commands[-1][2] == "training.stage1"


def test_mistake_in_the_last_stage_shows_before_the_first_command(tmp_path: Path, commands: list[list[str]]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path(QUICKSTART).read_text().replace("shuffle_turns", "shufle_turns"))
    with pytest.raises(ValueError, match=r"section stage2: unknown field 'shufle_turns'.*'shuffle_turns'"):
        pipeline.main(["--config", str(recipe), "--output_dir", str(tmp_path / "out")])
    assert commands == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "output_dir"),
        (["--output_dir", "o"], "--config is missing"),
        (["--output_dir", "o", "--sed", "1"], "did you mean 'seed'"),
    ],
)
def test_bad_command_lines(words: list[str], part: str) -> None:
    with pytest.raises(ValueError, match=r"command line|arguments") as caught:
        pipeline.main(words)
    assert part in str(caught.value)


def finish(step: pipeline.Step, inputs: dict[str, str], status: str = "complete") -> None:
    arguments = pipeline.stage_arguments(step)
    assert arguments is not None
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    RunRecord.start(step.name, arguments, inputs, 1).finish(status, train_seconds=2.0, parameters=1234)


def test_finished_stage_is_skipped_only_if_nothing_changed(
    tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    text = data / "dialogues.json"
    text.write_text("red\n")
    arguments = pipeline.PipelineArguments(output_dir=str(tmp_path / "out"), data_dir=str(data))
    step = pipeline.plan(QUICKSTART, arguments)[1]
    assert not pipeline.is_finished(step)
    finish(step, {"text": fingerprint(text)}, status="failed")
    assert not pipeline.is_finished(step)
    finish(step, {"text": fingerprint(text)})
    assert not pipeline.is_finished(step), "the model itself is missing"
    (tmp_path / "out" / "stage0_language" / "config.json").write_text("{}")
    assert pipeline.is_finished(step)
    pipeline.run_step(step, "title")
    assert commands == []
    assert "skipped" in capsys.readouterr().out
    other_seed = pipeline.PipelineArguments(output_dir=str(tmp_path / "out"), data_dir=str(data), seed=9)
    assert not pipeline.is_finished(pipeline.plan(QUICKSTART, other_seed)[1])
    text.write_text("blue\n")
    assert not pipeline.is_finished(step)


def results(partial: bool) -> dict[str, Any]:
    accuracy = {"value": 0.9912, "ci95": [0.9881, 0.9938]}
    return {
        "benchmark": {"name": "easy_vqa", "n": 200 if partial else 9673, "n_expected": 9673},
        "partial": partial,
        "metrics": {} if partial else {"accuracy": accuracy},
    }


def test_summary_reads_what_the_steps_wrote(tmp_path: Path) -> None:
    arguments = pipeline.PipelineArguments(output_dir=str(tmp_path))
    for step in pipeline.plan(QUICKSTART, arguments)[1:5]:
        finish(step, {})
    (tmp_path / "eval" / "easy_vqa").mkdir(parents=True)
    (tmp_path / "eval" / "easy_vqa" / "results.json").write_text(json.dumps(results(partial=False)))
    summary = pipeline.summary(arguments)
    assert "accuracy 99.12 % [98.81, 99.38]" in summary
    assert "9,673 questions" in summary
    assert "1,234 parameters, 8 s of training" in summary
    assert f"defocus-mllm chat {tmp_path / 'stage2'} --image" in summary
    record = pipeline.summary_record(QUICKSTART, arguments)
    assert record["parameters"] == 1234
    assert record["train_seconds"] == {**dict.fromkeys(pipeline.STAGES, 2.0), "total": 8.0}
    assert record["evaluation"][0]["metrics"] == results(partial=False)["metrics"]
    assert record["command"].startswith("python -m training.pipeline --config ")


def test_partial_evaluation_has_no_headline_number() -> None:
    assert pipeline.accuracy_line(results(partial=True)) == "easy_vqa: partial 200/9673: no headline number"


def test_a_stopped_stage_stops_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "run_forwarding", lambda words: EXIT_STOPPED if "training.stage1" in words else 0)
    with pytest.raises(SystemExit) as left:
        pipeline.main(["--config", QUICKSTART, "--output_dir", str(tmp_path), "--data_dir", "d"])
    assert left.value.code == EXIT_STOPPED
