"""The page about a run shows what its files say, stands alone, and is the same every time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from defocus_mllm import cli
from training import report

pytest.importorskip("matplotlib")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record: dict[str, Any] = {"stage": "stage2", "status": "complete", "inputs": {"data": "ab12"}, "seed": 7}
    record |= {"arguments": {"learning_rate": 0.25, "train": ["projector", "language_model"]}}
    record |= {"facts": {"data_report": {"records": 12345, "left_out": {"image missing": {"count": 3}}}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 1 / step, "learning_rate": 0.1, "tokens_per_second": 9.0} for step in (1, 2, 3)
    ]
    lines.append({"step": 3, "validation_loss": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    answers = [
        {"step": step, "record": "r[0]", "question": f"q{step}?", "answer": "<script>", "expected": "red"}
        for step in (1, 2, 3)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    return tmp_path


def test_the_page_shows_what_the_files_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(run)])
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    for shown in ("stage2: complete", "<td>data_report.records</td><td>12,345</td>", "image missing.count</td><td>3<"):
        assert shown in page
    for panel in ("loss", "validation_loss", "learning rate", "tokens a second"):
        assert f">{panel}</text>" in page
    assert "images a second" not in page
    assert "q1?" in page
    assert "q3?" in page
    assert "q2?" not in page  # the first and the last validation
    assert "projector language_model" in page


def test_it_stands_alone_escapes_and_is_the_same_every_time(run: Path) -> None:
    report.main([str(run), "--output", str(run / "one" / "page.html")])
    report.main([str(run), "--output", str(run / "two.html")])
    page = (run / "one" / "page.html").read_text()
    assert page == (run / "two.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page)


def test_a_run_that_has_just_begun_has_a_page(run: Path) -> None:
    for name in ("metrics.jsonl", "answers.jsonl"):
        (run / name).unlink()
    report.main([str(run)])
    assert "metrics.jsonl has no line yet" in (run / "report.html").read_text()


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json"):
        report.main([str(tmp_path)])


def test_the_command_of_the_package_makes_the_same_page(run: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(run), "--output", str(run / "other.html")])
    assert ended.value.code == 0
    report.main([str(run)])
    assert (run / "other.html").read_bytes() == (run / "report.html").read_bytes()
