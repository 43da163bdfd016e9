"""JSON, JSON Lines and digests."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxdict = 12


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    return _SHORT.repr(value)


def json_line(row: dict[str, Any]) -> str:
    """One row of a JSON Lines file, newline included."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without byte order mark, its line ends made "\\n".

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is a folder, or not UTF-8; the message names the file.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 (byte {error.start}): save it as UTF-8") from error


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not UTF-8, or malformed JSON; the message names file, line and column.
    """
    return parse_json(read_text(path), path)


def parse_json(text: str, path: Path) -> Any:
    """Parse the text of the JSON file `path`; errors as `read_json`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: malformed JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: malformed JSON: {error}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Parse a JSON Lines file; every line must be an object.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not UTF-8, or a malformed line; the message names file and line.
    """
    return parse_json_lines(read_text(path), path)


def parse_json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    """Parse the text of the JSON Lines file `path`; errors as `read_json_lines`."""
    lines = enumerate(text.split("\n"), 1)  # not splitlines: a JSON text may hold U+2028
    return [parse_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def parse_row(line: str | bytes, where: str) -> dict[str, Any]:
    """Parse one line of a JSON Lines file; `where` opens the message of the ValueError raised for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
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
