"""Tables: every cell with its interval, no number for a partial run, and each format escapes what it must."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.registry import Benchmark
from eval.run import evaluate
from eval.table import Table, main, read_table, to_html, to_latex, to_markdown
from tests.eval.fake_generator import FakeGenerator

AWKWARD = Table(("model", "a & b, 50 %"), (("x_1 | <b> {y} \\ ~ ^ # $", "80.00 [79.00, 81.00]"), ("z", "-")))


@pytest.fixture
def folders(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> list[Path]:
    evaluate(benchmark, FakeGenerator("model-a"), tmp_path / "a", data_root)
    evaluate(benchmark, FakeGenerator("model-b"), tmp_path / "b", data_root, limit=10)
    return [tmp_path / "a", tmp_path / "b"]


def test_cells_have_intervals_and_partial_runs_no_number(folders: list[Path]) -> None:
    table = read_table(folders, ["first", "second"])
    metric = json.loads((folders[0] / "easy_vqa" / "results.json").read_text())["metrics"]["accuracy"]
    value, low, high = (f"{100 * number:.2f}" for number in (metric["value"], *metric["ci95"]))
    assert table.header == ("model", "easy_vqa test, accuracy (%)")
    assert table.rows == (("first", f"{value} [{low}, {high}]"), ("second", "partial 10/60"))
    assert read_table([folders[0] / "easy_vqa"], ["first"]).rows == table.rows[:1]


def test_a_number_without_interval_stands_alone(folders: list[Path]) -> None:
    path = folders[0] / "easy_vqa" / "results.json"
    results = json.loads(path.read_text())
    metric = results["metrics"]["accuracy"]
    metric |= {"value": 0.5, "ci95": None, "style": {"scale": 1.0, "digits": 3, "unit": ""}}
    path.write_text(json.dumps(results))
    table = read_table(folders[:1])
    assert table.header[1] == "easy_vqa test, accuracy"
    assert table.rows[0][1] == "0.500"


def test_markdown_has_as_many_cells_in_every_line() -> None:
    lines = to_markdown(AWKWARD).splitlines()
    assert len(lines) == 4
    assert [line.replace("\\\\", "").replace("\\|", "").count("|") for line in lines] == [3] * 4
    assert "x_1 \\| <b>" in lines[2]


def test_latex_escapes_its_special_characters() -> None:
    text = to_latex(AWKWARD)
    assert r"model & a \& b, 50 \% \\" in text
    assert (
        r"x\_1 | <b> \{y\} \textbackslash{} \textasciitilde{} \textasciicircum{} \# \$ & 80.00 [79.00, 81.00] \\"
        in text
    )
    assert text.startswith("\\begin{tabular}{lr}\n  \\toprule\n")
    assert text.endswith("  \\bottomrule\n\\end{tabular}\n")


def test_html_reads_back() -> None:
    cells: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            if data.strip():
                cells.append(data)

    Reader().feed(to_html(AWKWARD))
    assert cells == [*AWKWARD.header, *AWKWARD.rows[0], *AWKWARD.rows[1]]


def test_command_writes_a_file(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = folders[0].parent / "table.tex"
    main([str(folders[0]), "--format", "latex", "--output", str(output)])
    assert capsys.readouterr().out == f"table: {output}\n"
    assert output.read_text().startswith("\\begin{tabular}")
    main([str(folders[0])])
    assert capsys.readouterr().out.startswith("| model | easy_vqa test, accuracy (%) |\n")


def test_rows_must_be_tellable_apart_and_comparable(folders: list[Path]) -> None:
    with pytest.raises(ValueError, match="several models are called 'fake': give --names"):
        read_table(folders)
    with pytest.raises(ValueError, match="--names: 1 names for 2 folders"):
        read_table(folders, ["one"])
    with pytest.raises(FileNotFoundError, match="holds no results"):
        read_table([folders[0].parent / "nowhere"])
    path = folders[1] / "easy_vqa" / "results.json"
    results = json.loads(path.read_text())
    results["benchmark"]["fingerprint"] = "other"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="easy_vqa test was measured on other data"):
        read_table(folders, ["first", "second"])
