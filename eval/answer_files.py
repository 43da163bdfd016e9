"""Answer files of any evaluation, read into rows: JSON Lines, JSON, tables (.tsv, .csv, .txt, .xlsx), folders of those.

What the rows mean is each benchmark's matter (`Format`); here every record is only given a place to name in messages.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.files import parse_json, parse_json_lines, read_text, shown
from eval.samples import Prediction
from eval.spreadsheet import read_first_sheet

_Records = list[tuple[str, dict[str, Any]]]
"""(place, row) of each record of a file."""


@dataclass(frozen=True)
class AnswerRow:
    """One record: where it stands (for messages), the file, and its fields.

    Columns without a header are the list `columns`.
    """

    where: str
    file: Path
    values: dict[str, Any]


@dataclass(frozen=True)
class AnswerFile:
    """What was read: the file or folder as given, the files in it, how they are written, and their rows in order."""

    name: str
    files: tuple[Path, ...]
    container: str
    rows: tuple[AnswerRow, ...]

    def with_rows(self, rows: Sequence[AnswerRow]) -> AnswerFile:
        """The same file with other rows; ValueError if there are none."""
        if not rows:
            raise ValueError(f"{self.name}: holds no answers")
        return AnswerFile(self.name, self.files, self.container, tuple(rows))

    def entries(self, id_field: str, text_field: str) -> AnswerFile:
        """The rows of one object, id -> answer, under these names; itself where it is no such object."""
        whole = self.rows[0].values
        if len(self.rows) > 1 or id_field in whole or LLAVA.id_field in whole:
            return self
        place, file = self.rows[0].where, self.rows[0].file
        return self.with_rows(
            [
                AnswerRow(f"{place}, {shown(key)}", file, {id_field: key, text_field: text})
                for key, text in whole.items()
            ]
        )


@dataclass(frozen=True)
class Format:
    """A known layout of rows: its name, the field that names the sample, and the field with the answer."""

    name: str
    id_field: str
    text_field: str

    def __str__(self) -> str:
        """The name with the fields."""
        return f"{self.name} ({self.id_field}, {self.text_field})"


OWN = Format("rows of samples.jsonl", "id", "text")
LLAVA = Format("LLaVA answers", "question_id", "text")


@dataclass(frozen=True)
class Imported:
    """Predictions by sample id, the format they were recognised as, and the rows that were meant for others."""

    predictions: dict[str, Prediction]
    format: str
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> number of rows."""
    model: str | None = None
    """`model_id`, where all rows name the same."""


def read_answers(*paths: Path) -> AnswerFile:
    """Read an answer file, several, or a folder of them (in the order of their names), hidden files aside.

    Raises:
        FileNotFoundError: there is no such file, or a folder holds none.
        ValueError: a malformed or empty file, or files that are not all written alike; the message names file and
            record.
    """
    files = [file for path in paths for file in _files_in(path)]
    name = ", ".join(map(str, paths))
    containers, rows = [], []
    for file in files:
        container, values = _read_file(file)
        containers.append(container)
        rows += [AnswerRow(where, file, row) for where, row in values]
        if container != containers[0]:
            raise ValueError(f"{file}: {container}, but {files[0]} is {containers[0]}: give files of one kind")
    several = f"{len(files)} files, each " if len(files) > 1 else ""
    return AnswerFile(name, tuple(files), several + containers[0], ()).with_rows(rows)


def _files_in(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file")
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    folder = next((entry for entry in entries if entry.is_dir()), None)
    if folder is not None:
        raise ValueError(f"{path}: a folder of answer files was expected, but {folder.name!r} in it is a folder")
    if not entries:
        raise FileNotFoundError(f"{path}: this folder is empty: no answer files")
    return entries


def _read_file(path: Path) -> tuple[str, _Records]:
    """How a file is written, and its records."""
    match path.suffix.lower():
        case ".xlsx":
            return "Excel workbook", _with_header(read_first_sheet(path), path, "row")
        case ".tsv":
            return "table", _with_header(_tab_separated(path), path, "record")
        case ".csv":
            return "columns (.csv)", _columns(path, ",")
        case ".txt":
            return "columns (.txt)", _columns(path, "\t")
    return _read_json(path)


def _columns(path: Path, delimiter: str) -> _Records:
    """The lines of a table without header, split as the official readers do: a quotation mark means nothing."""
    lines = ((at, line.split(delimiter)) for at, line in enumerate(read_text(path).split("\n"), 1))
    return [(f"{path}, line {at}", {"columns": cells}) for at, cells in lines if any(cell.strip() for cell in cells)]


def _with_header(lines: Iterable[tuple[int, list[str]]], path: Path, unit: str) -> _Records:
    """Name the cells after the first line; ValueError on a repeated name, or a line longer or shorter than that."""
    remaining = iter(lines)
    header = [name.strip() for name in next(remaining, (0, []))[1]]
    repeated = next((name for name in header if name and header.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"{path}: two columns are called {repeated!r}")
    records: _Records = []
    for at, cells in remaining:
        if len(cells) != len(header):
            raise ValueError(f"{path}, {unit} {at}: {len(cells)} columns, but the header has {len(header)}")
        records.append((f"{path}, {unit} {at}", dict(zip(header, cells, strict=True))))
    return records


def _tab_separated(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(record, cells) of a table, of which record 0 is the header; cells in quotation marks may hold line ends."""
    csv.field_size_limit(sys.maxsize)  # images stand in tables, in base64
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t", strict=True)
    try:
        yield from enumerate(cells for cells in reader if cells)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: malformed table: {error}") from error


def _read_json(path: Path) -> tuple[str, _Records]:
    """A JSON list of objects, JSON Lines or, where the first line is not whole, one JSON object over many lines."""
    text = read_text(path).lstrip()
    if text.startswith("["):
        rows = parse_json(text, path)
        wrong = next((at for at, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
        if wrong is not None:
            raise ValueError(f"{path}, record {wrong}: expected a JSON object, found {shown(rows[wrong - 1])}")
        container = "JSON list"
    elif text.startswith("{") and not _is_whole(text.partition("\n")[0]):
        container, rows = "JSON object", [parse_json(text, path)]
    else:
        container, rows = "JSON Lines", parse_json_lines(text, path)
    return container, [(f"{path}, record {at}", row) for at, row in enumerate(rows, 1)]


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
