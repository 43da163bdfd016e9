"""JSON, JSON Lines and digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def json_line(row: dict[str, Any]) -> str:
    """One row of a JSON Lines file, newline included."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: malformed JSON; the message names file, line and column.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: malformed JSON: {error.msg}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Parse a JSON Lines file; every line must be an object.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a malformed line; the message names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open(encoding="utf-8") as file:
        return [parse_row(line, f"{path}, line {number}") for number, line in enumerate(file, 1) if line.strip()]


def parse_row(line: str | bytes, where: str) -> dict[str, Any]:
    """Parse one line of a JSON Lines file; `where` opens the message of the ValueError raised for anything else."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: malformed JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def sha256_of_json(value: Any) -> str:
    """Digest of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
    """Digest of the names and contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
