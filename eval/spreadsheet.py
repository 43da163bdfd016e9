"""The first sheet of an Excel workbook (.xlsx), as text; MMBench's test server takes answers so, and harnesses write
them.

A workbook is a zip archive of XML (ECMA-376, part 1, 18.3): a cell holds its text itself (`inlineStr`, `str`), a
position in the table of shared texts (`s`), or a number, whose text is kept as it is written. Formulas are not
computed: the value that was stored with them counts.
"""

from __future__ import annotations

import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"

_DAMAGES = (
    zipfile.BadZipFile,
    zlib.error,
    ElementTree.ParseError,
    EOFError,
    IndexError,
    KeyError,
    OSError,  # a position that the damage moved before the start of the file
    RuntimeError,  # encrypted, or compressed in a way that zipfile does not know
    ValueError,
)


def read_first_sheet(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(row number, cells) of the first sheet, empty rows left out; every row is as long as the first one, or longer.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no workbook, or a damaged one; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            yield from _rows(archive)
    except _DAMAGES as error:
        raise ValueError(f"{path}: not an .xlsx workbook, or a damaged one: {error}") from error


def _rows(archive: zipfile.ZipFile) -> Iterator[tuple[int, list[str]]]:
    shared = _shared_texts(archive)
    width = 0
    with archive.open(_first_sheet(archive)) as sheet:
        for _, row in ElementTree.iterparse(sheet):
            if row.tag != f"{_SHEET}row":
                continue
            cells: dict[int, str] = {}
            for place, cell in enumerate(row.iter(f"{_SHEET}c")):
                cells[_column(cell.get("r"), place)] = _text_of(cell, shared)
            width = width or max(cells, default=-1) + 1
            filled = [at + 1 for at, text in cells.items() if text]
            if filled:
                yield int(row.get("r") or 0), [cells.get(at, "") for at in range(max(width, *filled))]
            row.clear()  # a sheet may hold images as text: keep one row at a time


def _first_sheet(archive: zipfile.ZipFile) -> str:
    """Name of the part that holds the first sheet: workbook.xml names a relation, the relations name the part."""
    book = ElementTree.fromstring(archive.read("xl/workbook.xml"))
    relation = next(book.iter(f"{_SHEET}sheet"), ElementTree.Element("none")).get(_RELATION)
    for entry in ElementTree.fromstring(archive.read("xl/_rels/workbook.xml.rels")):
        if entry.get("Id") == relation:
            return posixpath.normpath(posixpath.join("/xl", entry.attrib["Target"])).lstrip("/")
    raise KeyError("it names no sheet")


def _shared_texts(archive: zipfile.ZipFile) -> list[str]:
    if "xl/sharedStrings.xml" not in archive.namelist():
        return []
    return [_joined(entry) for entry in ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))]


def _joined(element: ElementTree.Element) -> str:
    """The text of runs of differently formatted text, without the reading aids (`rPh`) of Japanese."""
    runs = (run for run in element if run.tag != f"{_SHEET}rPh")
    return "".join(text.text or "" for run in runs for text in run.iter(f"{_SHEET}t"))


def _column(reference: str | None, place: int) -> int:
    """Zero-based column of a reference such as "AB12"; without one, the cell's place in its row."""
    letters = re.match(r"[A-Z]+", reference or "")
    if letters is None:
        return place
    number = 0
    for letter in letters[0]:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1


def _text_of(cell: ElementTree.Element, shared: list[str]) -> str:
    if cell.get("t") == "inlineStr":
        inline = cell.find(f"{_SHEET}is")
        return "" if inline is None else _joined(inline)
    value = cell.findtext(f"{_SHEET}v") or ""
    return shared[int(value)] if cell.get("t") == "s" and value else value
