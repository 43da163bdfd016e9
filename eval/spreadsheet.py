"""The first sheet of an Excel workbook (.xlsx), as text: MMBench's server takes answers so; harnesses write them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openpyxl


def read_first_sheet(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(row number, cells) of the first sheet, empty rows left out; every row is as long as the first one, or longer.

    Formulas are not computed: the value that was stored with them counts.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no workbook, or a damaged one; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(action="ignore"):  # of styles and extensions, which nothing here needs
            rows = _read(path)
    except Exception as error:  # openpyxl raises whatever its parts do where a file is damaged
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not an .xlsx workbook, or a damaged one: {reason}") from error
    width = 0
    for number, cells in rows:
        filled = [at + 1 for at, text in enumerate(cells) if text]
        width = width or max(filled, default=0)
        if filled:
            yield number, [*cells, *[""] * width][: max(width, *filled)]


def _read(path: Path) -> list[tuple[int, list[str]]]:
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # what a file says about its own size may be wrong
        rows = enumerate(sheet.iter_rows(values_only=True), 1)
        return [(number, [_text(value) for value in values]) for number, values in rows]
    finally:
        book.close()


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)
