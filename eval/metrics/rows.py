"""What the metrics of rows and of answers check of their arguments, so that a misuse is an error and not a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_rows(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raise ValueError, naming the first row and key at fault, unless there are rows and each has all these keys."""
    if not rows:
        raise ValueError("rows: expected at least one")
    for number, row in enumerate(rows, 1):
        missing = [name for name in names if name not in row]
        if missing:
            raise ValueError(
                f"row {number}: expected the keys {', '.join(names)}; missing {missing}, found {sorted(row)}"
            )


def check_answers(answers: Sequence[str]) -> None:
    """Raise ValueError unless these are answers, at least one: a string would be taken for a list of its letters."""
    if isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers: expected a list of strings, found {answers!r}")
    if not answers:
        raise ValueError("answers: expected at least one")


def check_mode(mode: str, modes: Sequence[str]) -> None:
    """Raise ValueError unless `mode` is one of `modes`."""
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}, found {mode!r}")
