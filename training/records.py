"""Records of a JSON list or of a JSON Lines file, with errors that name file, line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The objects in `path`: one JSON list, or one JSON object a line (told by the first character).

    Raises FileNotFoundError, or ValueError naming file, line and column if the file is not UTF-8, not JSON, holds no
    record, or holds something that is not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    records = _parse_list(text, path) if text.lstrip()[:1] == "[" else _parse_lines(text, path)
    if not records:
        raise ValueError(f"{path} holds no record")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path.name}[{index}] in {path} is a {type(record).__name__}, not a JSON object")
    return records


def record_name(path: str | Path, index: int, record: dict[str, Any]) -> str:
    """How messages call a record: `conversations.json[12] (id 12)`."""
    identifier = f" (id {record['id']})" if "id" in record else ""
    return f"{Path(path).name}[{index}]{identifier}"


def _parse_list(text: str, path: Path) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error


def _parse_lines(text: str, path: Path) -> list[Any]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: malformed JSON at line {number}, column {error.colno}: {error.msg}"
                " (expected a JSON list, or one whole JSON object a line)"
            ) from error
    return records
