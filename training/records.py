"""Records of a JSON list or of a JSON Lines file, one at a time, with errors that name file, line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

LARGEST_RECORD = 16 * 1024**2
"""Characters of one record (bytes of a line); what is longer is no record but another kind of file."""

_BLOCK = 1024**2
_NOT_SPACE = re.compile(r"[^ \t\r\n]")
_LONGEST_NAME = 100


class MalformedLine(ValueError):
    """A line of a JSON Lines file that is not JSON; the lines after it can still be read."""


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The objects in `path`: one JSON list, or one JSON object a line (told by the first character).

    Raises FileNotFoundError, or ValueError naming file, line and column if the file is not UTF-8, not JSON, holds no
    record, or holds something that is not an object.
    """
    path, records = Path(path), []
    for index, record in enumerate(iterate_records(path)):
        if isinstance(record, MalformedLine):
            raise record
        if not isinstance(record, dict):
            raise ValueError(f"{path.name}[{index}] in {path} is a {type(record).__name__}, not a JSON object")
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no record")
    return records


def iterate_records(path: str | Path) -> Iterator[Any]:
    """The values in `path` in order, of which few are in memory at a time; `MalformedLine` where a line is not JSON.

    Raises FileNotFoundError, or ValueError naming file, line and column where the rest cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    if _begins_with_bracket(path):
        with path.open(encoding="utf-8-sig", newline="\n") as stream:
            yield from _ListReader(stream, path).values()
    else:
        yield from _lines(path)


def record_name(path: str | Path, index: int, record: Any) -> str:
    """How messages call a record: `conversations.json[12] (id 12)`."""
    identifier = ""
    if isinstance(record, dict) and isinstance(record.get("id"), str | int | float):
        identifier = f" (id {shorten(str(record['id']), _LONGEST_NAME)})"
    return f"{Path(path).name}[{index}]{identifier}"


def shorten(text: str, length: int = 200) -> str:
    """At most `length` characters of `text` in one line that can be written as UTF-8."""
    text = text if len(text) <= length else text[: length - 3] + "..."
    return " ".join(text.split()).encode("utf-8", "replace").decode("utf-8")


def _begins_with_bracket(path: Path) -> bool:
    with path.open("rb") as stream:
        block = stream.read(_BLOCK).removeprefix(b"\xef\xbb\xbf")
        while block and not block.strip():
            block = stream.read(_BLOCK)
    return block.lstrip()[:1] == b"["


def _lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as stream:
        if stream.read(3) != b"\xef\xbb\xbf":
            stream.seek(0)
        number = 0
        while line := stream.readline(LARGEST_RECORD + 1):
            number += 1
            if len(line) > LARGEST_RECORD:
                raise ValueError(f"{path}: line {number} is longer than {LARGEST_RECORD:,} bytes; is it JSON Lines?")
            if line.strip():
                yield _parse_line(line, number, path)


def _parse_line(line: bytes, number: int, path: Path) -> Any:
    expected = "expected a JSON list, or one whole JSON object a line"
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return MalformedLine(f"{path} is not UTF-8 text at line {number} (byte {error.start}); convert it first")
    except json.JSONDecodeError as error:
        return MalformedLine(f"{path}: malformed JSON at line {number}, column {error.colno}: {error.msg} ({expected})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        return MalformedLine(f"{path}: malformed JSON at line {number}: {shorten(str(error))} ({expected})")


class _ListReader:
    """The values of one JSON list, through a window that moves over the text."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._decoder = json.JSONDecoder()
        self._text, self._position = "", 0
        self._line, self._column = 1, 0  # where the window begins

    def values(self) -> Iterator[Any]:
        """Raises ValueError naming file, line and column for the first thing that is not JSON."""
        self._next_character()
        self._position += 1  # the bracket
        if self._next_character() == "]":
            self._position += 1
        else:
            separator = ","
            while separator == ",":
                self._next_character()
                yield self._value()
                separator = self._next_character()
                if separator not in ("]", ","):
                    raise self._error("Expecting ',' delimiter", self._position)
                self._position += 1
        if self._next_character():
            raise self._error("Extra data", self._position)

    def _next_character(self) -> str:
        """The next one that is not white space, which is where the position moves; empty at the end of the file."""
        while True:
            found = _NOT_SPACE.search(self._text, self._position)
            if found:
                self._position = found.start()
                return found.group()
            self._position = len(self._text)
            if not self._read_on():
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                from_here = error.pos - self._position
                if not self._is_cut_off(error) or not self._read_on():
                    raise self._error(error.msg, self._position + from_here) from error
            except (ValueError, RecursionError) as error:
                raise self._error(shorten(str(error)), self._position) from error
            else:
                self._position = end
                return value

    def _is_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether more text may mend it: the window ends in a string, or within a word or number of the error."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - len("-Infinity")

    def _read_on(self) -> bool:
        """Drop what lies behind the position and read as much again as is left, at least a block."""
        behind = self._text[: self._position]
        newline = behind.rfind("\n")
        self._line += behind.count("\n")
        self._column = self._column + len(behind) if newline < 0 else len(behind) - newline - 1
        self._text, self._position = self._text[self._position :], 0
        if len(self._text) > LARGEST_RECORD:
            raise self._error(f"a record is longer than {LARGEST_RECORD:,} characters", 0)
        try:
            more = self._stream.read(max(_BLOCK, len(self._text)))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._path} is not UTF-8 text, somewhere after line {self._line}; convert it first"
            ) from error
        self._text += more
        return bool(more)

    def _error(self, message: str, position: int) -> ValueError:
        before = self._text[:position]
        newline = before.rfind("\n")
        column = (self._column + len(before) if newline < 0 else len(before) - newline - 1) + 1
        line = self._line + before.count("\n")
        return ValueError(f"{self._path}: malformed JSON at line {line}, column {column}: {message}")
