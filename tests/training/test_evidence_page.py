"""The evidence's table, figure and page, from hand-made results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from training.evidence_page import figure, markdown, write_page, write_results


@pytest.fixture
def results() -> dict[str, Any]:
    estimate = {"mean": 0.75, "by_seed": [0.7, 0.8], "ci95_images": [0.74, 0.76], "ci95_seeds": [0.1, 1.4]}
    row = {"name": "a", "title": "De-focus A", "parameters": 1234, "seeds": [0, 1], "partial": False, **estimate}
    one = {"mean": 0.5, "by_seed": [0.5], "ci95_images": [0.45, 0.55], "ci95_seeds": None}
    partial = {"name": "b", "title": "plain B", "parameters": 1200, "seeds": [1], "partial": True, **one}
    none = {"name": "c", "title": "C", "parameters": 1201, "seeds": [], "partial": True}
    difference = {"mean": 0.25, "by_seed": [0.25], "ci95_images": [-0.01, 0.3], "ci95_seeds": None}
    return {
        "study": "A study",
        "partial": True,
        "runs_finished": 3,
        "runs_expected": 6,
        "seeds": [0, 1],
        "models": [{**row, "train_seconds": 1500.4}, {**partial, "train_seconds": 20.0}, none],
        "comparisons": [{"model": "De-focus A", "reference": "plain B", "seeds": [1], "partial": True, **difference}],
        "command": "python -m training.evidence --seeds 0 1",
        "training": "5 epochs",
        "commits": ["abc"],
        "hardware": [{"gpu": None, "processor": "A processor", "cores": 2, "threads": 1}],
        "versions": [],
        "pictures": {"train": [50000], "test": [10000]},
    }


def test_table_shows_every_number_and_what_is_partial(results: dict[str, Any]) -> None:
    lines = markdown(results).splitlines()
    assert lines[0] == "**Partial: 3 of 6 runs are finished; the numbers below will change.**"
    assert "| De-focus A | 1,234 | 75.00 | 74.00 to 76.00 | 10.00 to 140.00 | 70.00, 80.00 | 1,500 s |" in lines
    assert "| plain B (partial: 1 of 2 seeds) | 1,200 | 50.00 | 45.00 to 55.00 | one seed | 50.00 | 20 s |" in lines
    assert "| C | 1,201 | not finished | | | | |" in lines
    assert "| De-focus A − plain B (partial: 1 of 2 seeds) | +25.00 | -1.00 to +30.00 | one seed | +25.00 |" in lines


def test_complete_table_does_not_call_itself_partial(results: dict[str, Any]) -> None:
    complete = {**results, "partial": False, "models": results["models"][:1], "comparisons": []}
    text = markdown(complete)
    assert "artial" not in text
    assert "Difference |" not in text


def test_figure_shows_finished_models_and_is_reproducible(results: dict[str, Any]) -> None:
    svg = figure(results)
    ElementTree.fromstring(svg)
    assert "De-focus A" in svg
    assert "plain B (partial" in svg
    assert "<!-- C -->" not in svg
    assert svg == figure(results)


def test_files_of_a_study(tmp_path: Path, results: dict[str, Any]) -> None:
    write_results(tmp_path / "main", results)
    assert json.loads((tmp_path / "main" / "results.json").read_text()) == results
    assert {path.name for path in (tmp_path / "main").iterdir()} == {"results.json", "table.md", "figure.svg"}
    write_results(tmp_path / "none", {**results, "runs_finished": 0})
    assert not (tmp_path / "none" / "figure.svg").exists()


def test_page_keeps_what_a_person_wrote(tmp_path: Path, results: dict[str, Any]) -> None:
    page = tmp_path / "results" / "cifar10.md"
    write_page(page, "main", results)
    write_page(page, "other", {**results, "study": "Another"})
    text = page.read_text()
    assert text.startswith("# CIFAR-10: what was measured\n\n<!-- generated: main -->\n## A study\n")
    page.write_text(text.replace("<!-- end: main -->", "<!-- end: main -->\n\nWhat held: all of it."))
    results["models"][0]["mean"] = 0.6
    write_page(page, "main", results)
    text = page.read_text()
    assert "What held: all of it." in text
    assert text.count("<!-- generated: main -->") == text.count("## A study") == text.count("## Another") == 1
    assert "| 60.00 |" in text
    assert "Command: `python -m training.evidence --seeds 0 1`" in text
    assert "Hardware: A processor, 2 cores, 1 thread(s) a run" in text
    assert "training images 50,000, test images 10,000" in text
    assert {path.name for path in page.parent.iterdir()} == {
        "cifar10.md",
        *("cifar10_main.svg", "cifar10_main.json", "cifar10_other.svg", "cifar10_other.json"),
    }


def test_writing_twice_changes_nothing(tmp_path: Path, results: dict[str, Any]) -> None:
    page = tmp_path / "page.md"
    write_page(page, "main", results)
    before = page.read_bytes()
    write_page(page, "main", results)
    assert page.read_bytes() == before


def test_page_without_the_end_of_its_part_is_refused(tmp_path: Path, results: dict[str, Any]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# T\n<!-- generated: main -->\n## Hand-written\n")
    with pytest.raises(ValueError, match=r"page\.md: <!-- generated: main --> has no <!-- end: main -->"):
        write_page(page, "main", results)
    assert "Hand-written" in page.read_text()
