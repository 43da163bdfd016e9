"""The page of user problems has all of them, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "user_problems.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \|.*\|$", PAGE, re.MULTILINE)
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_all_problems_are_there_and_each_names_a_test() -> None:
    assert [str(number) for number in range(1, 26)] == ROWS
    for line in PAGE.splitlines():
        if re.match(r"\| \d+ \|", line):
            last_column = line.rstrip("|").rsplit("|", 1)[1]
            assert re.search(r"`tests/[\w/]+\.py::test_\w+`", last_column), line


def test_every_test_that_is_named_exists() -> None:
    missing = [f"{path}::{name}" for path, name in NAMED if name not in functions(ROOT / path)]
    assert not missing
    assert len(NAMED) == PAGE.count("::"), "a test is named in a form that this test does not read"
