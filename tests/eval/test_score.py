"""Scoring a predictions file without a model, and the frame around the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from defocus_mllm.console import run_script
from eval.registry import Benchmark
from eval.run import evaluate
from eval.score import main, score_file
from tests.eval.fake_generator import FakeGenerator


@pytest.fixture
def predictions(benchmark: Benchmark, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("eval.score.get_benchmark", lambda name: benchmark)
    evaluate(benchmark, FakeGenerator(), tmp_path / "run", data_root)
    return tmp_path / "run" / "easy_vqa" / "predictions.jsonl"


def test_score_gives_the_metrics_of_the_run(predictions: Path, data_root: Path, tmp_path: Path) -> None:
    printed = score_file("easy_vqa", predictions, tmp_path / "scored", data_root)
    scored = json.loads((tmp_path / "scored" / "results.json").read_text())
    run = json.loads((predictions.parent / "results.json").read_text())
    for block in ("metrics", "breakdown", "benchmark", "partial"):
        assert scored[block] == run[block]
    assert printed.startswith("easy_vqa test: accuracy ")
    assert (tmp_path / "scored" / "samples.jsonl").read_text() == (predictions.parent / "samples.jsonl").read_text()


def test_what_was_read_is_printed_and_recorded(predictions: Path, data_root: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    (tmp_path / "chunks").mkdir()
    for name, chunk in (("2_0.jsonl", rows[::2]), ("2_1.jsonl", rows[1::2])):
        llava = [{"question_id": row["id"], "text": row["text"], "model_id": "some-7b"} for row in chunk]
        (tmp_path / "chunks" / name).write_text("".join(json.dumps(row) + "\n" for row in llava))
    printed = score_file("easy_vqa", tmp_path / "chunks", tmp_path / "scored", data_root)
    assert printed.splitlines()[-1] == (
        "  read as LLaVA answers (question_id, text), 2 files, each JSON Lines: 60 answers"
    )
    scored = json.loads((tmp_path / "scored" / "results.json").read_text())
    assert scored["metrics"] == json.loads((predictions.parent / "results.json").read_text())["metrics"]
    model = scored["model"]
    assert model["name"] == "some-7b"
    assert model["predictions_format"] == "LLaVA answers (question_id, text), 2 files, each JSON Lines"
    assert model["predictions_left_out"] == {}
    chunks = [str(tmp_path / "chunks" / name) for name in ("2_0.jsonl", "2_1.jsonl")]
    root = ["--data-root", str(data_root), "--output", str(tmp_path / "again")]
    main(["--benchmark", "easy_vqa", "--predictions", *chunks, *root])
    assert json.loads((tmp_path / "again" / "results.json").read_text())["run_id"] == scored["run_id"]


def test_incomplete_predictions_get_no_headline_number(predictions: Path, data_root: Path, tmp_path: Path) -> None:
    predictions.write_text("".join(predictions.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"1 of 60 samples have no prediction \(test-00059\):"):
        score_file("easy_vqa", predictions, tmp_path / "scored", data_root)
    (tmp_path / "one.jsonl").write_text(predictions.read_text().splitlines()[0])
    with pytest.raises(ValueError, match=r"59 of 60 samples .* \((test-\d+, ){4}test-\d+ and 54 more\):"):
        score_file("easy_vqa", tmp_path / "one.jsonl", tmp_path / "scored", data_root)
    printed = score_file("easy_vqa", predictions, tmp_path / "scored", data_root, partial=True)
    headline, health, read = printed.split("\n")
    assert headline == "easy_vqa test: partial 59/60: no headline number"
    assert health.startswith("  unparsed ")
    assert read.startswith("  read as rows of samples.jsonl")


def test_answers_that_do_not_say_how_they_ended_are_not_counted_as_whole(
    predictions: Path, data_root: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    for name, finish, truncated in (("told", "length", 1), ("silent", None, None)):
        rows[0]["finish"] = finish
        said = rows if finish else [{"id": row["id"], "text": row["text"]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
        printed = score_file("easy_vqa", tmp_path / f"{name}.jsonl", tmp_path / name, data_root)
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["health"]["truncated"] == truncated
        assert f"truncated {'unknown' if truncated is None else truncated}," in printed


def test_the_result_of_another_benchmark_is_not_replaced(predictions: Path, data_root: Path, tmp_path: Path) -> None:
    score_file("easy_vqa", predictions, tmp_path / "scored", data_root)
    path = tmp_path / "scored" / "results.json"
    results = json.loads(path.read_text())
    score_file("easy_vqa", predictions, tmp_path / "scored", data_root)
    path.write_text(json.dumps(results | {"benchmark": results["benchmark"] | {"name": "pope"}}))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="scored: holds the result of pope test, which would be lost: give another"):
        score_file("easy_vqa", predictions, tmp_path / "scored", data_root)
    assert path.read_bytes() == before


def test_incomplete_predictions_replace_no_complete_result(predictions: Path, data_root: Path, tmp_path: Path) -> None:
    score_file("easy_vqa", predictions, tmp_path / "scored", data_root)
    before = (tmp_path / "scored" / "results.json").read_text()
    predictions.write_text("".join(predictions.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="holds a complete result"):
        score_file("easy_vqa", predictions, tmp_path / "scored", data_root, partial=True)
    assert (tmp_path / "scored" / "results.json").read_text() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "test-00000", "text": "no"}', "record 61: a second prediction for 'test-00000'"),
        ('{"id": "test-99999", "text": "no"}', "record 61: 'test-99999' is no sample"),
        ('{"id": "test-00000"}', "record 61: 'text' must be a string"),
        ('{"id": "' + "x" * 10**6 + '", "text": "no"}', "record 61: 'xx.{60,90}' is no sample"),
        (
            '{"id": "test-00000", "text": [' + "1, " * 10**6 + "1]}",
            r"record 61: 'text' must be a string, found \[1, .{,60}$",
        ),
        ("[1]", "line 61: expected a JSON object"),
    ],
)
def test_bad_records_are_named(predictions: Path, data_root: Path, tmp_path: Path, line: str, message: str) -> None:
    predictions.write_text(predictions.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        score_file("easy_vqa", predictions, tmp_path / "scored", data_root)
    assert not (tmp_path / "scored").exists()


def test_user_errors_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--benchmark", "easy_vqa", "--predictions", str(tmp_path / "none.jsonl"), "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_information:
        run_script(lambda: main(arguments))
    assert exit_information.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.jsonl'}: no such file\n"


def test_interruption_is_not_success(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_information:
        run_script(interrupted)
    assert exit_information.value.code == 130
    assert "interrupted" in capsys.readouterr().err
