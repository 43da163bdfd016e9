"""A checked copy of a source's conversations in a memory-mapped file: made once, shared by all processes and runs.

A list of a million records in Python takes gigabytes, and each process and worker has its own. Here the operating
system keeps one copy of what is read for all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
from filelock import FileLock
from tqdm import tqdm

from defocus_mllm.files import PARTIAL_PREFIX, write_json_atomically, written_whole
from training.conversation_records import BadRecord, CheckedRecord, ImageReference, check_record
from training.conversation_sources import Source, open_source
from training.files import remove_partial_work

SCHEMA_VERSION = 2
"""Part of every index's name: a change of what is checked or stored makes new ones."""

_IMAGE = pyarrow.struct(
    [("path", pyarrow.string()), ("offset", pyarrow.int64()), ("size", pyarrow.int64()), ("bytes", pyarrow.binary())]
)
_CONVERSATIONS = pyarrow.schema(
    [
        ("position", pyarrow.int64()),
        ("name", pyarrow.string()),
        ("messages", pyarrow.large_string()),
        ("images", pyarrow.list_(_IMAGE)),
        ("num_images", pyarrow.int32()),
        ("num_characters", pyarrow.int32()),
        ("num_answers", pyarrow.int32()),
    ]
)
_PROBLEMS = pyarrow.schema([(name, pyarrow.string()) for name in ("name", "reason", "message")])
_ROWS_AT_ONCE = 1000
_BYTES_AT_ONCE = 16 * 1024**2


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used."""

    name: str
    """How messages call it."""
    reason: str
    """The kind of problem in a few words, for counting."""
    message: str
    """Names the record and says how to mend it."""


def open_index(location: str | Path, repair: bool = False, cache: str | Path = "") -> ConversationIndex:
    """The index of a source; it is built if there is none of its present content.

    Indexes are kept in `cache`; empty: beside what `datasets` keeps, which HF_DATASETS_CACHE moves. One process builds
    it, others that ask for the same wait. Raises what reading the source raises; nothing half-made is left then.
    """
    source = open_source(location)
    name = os.path.basename(source.location)  # stands in every message
    content = f"{type(source).__name__} {name} {source.fingerprint()}"
    key = f"{hashlib.sha256(content.encode()).hexdigest()[:32]}-{'repaired' if repair else 'strict'}-{SCHEMA_VERSION}"
    folder = Path(cache or Path(datasets.config.HF_DATASETS_CACHE) / "defocus_conversations") / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):
            if not folder.is_dir():
                remove_partial_work(folder.parent, f"{PARTIAL_PREFIX}{key}-")
                with written_whole(folder) as partial:
                    _build(source, partial, repair)
    try:
        return ConversationIndex(folder, source)
    except (pyarrow.ArrowException, ValueError, KeyError, OSError) as error:
        raise ValueError(f"the index {folder} of {location} is damaged ({error}); delete that folder") from error


class ConversationIndex:
    """The usable conversations of a source by row, and what was wrong with its other records."""

    def __init__(self, folder: Path, source: Source) -> None:
        self.source = source
        self.facts: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        """`records` of the source, how many were `repaired` by kind, how many `distinct_images` they name."""
        self._rows = _MappedTable(folder / "conversations.arrow")
        self._problems = _MappedTable(folder / "problems.arrow")

    def __len__(self) -> int:
        return self._rows.num_rows

    def name(self, row: int) -> str:
        """How messages call the record."""
        return self._rows.value("name", row)

    def position(self, row: int) -> int:
        """The record's number in the source."""
        return self._rows.value("position", row)

    def messages(self, row: int) -> list[dict[str, Any]]:
        """Structured messages; the image parts hold nothing yet."""
        return json.loads(self._rows.value("messages", row))

    def images(self, row: int) -> list[ImageReference]:
        """The images of the row, in the order of its image parts."""
        return [ImageReference(**image) for image in self._rows.value("images", row)]

    def named_images(self) -> Iterator[tuple[int, list[str]]]:
        """(row, names of its images that are files below the image root) of each row that has such."""
        for start, chunk in self._rows.chunks("images"):
            paths, sizes = (chunk.flatten().field(name) for name in ("path", "size"))
            names = [
                path if size is None else None for path, size in zip(paths.to_pylist(), sizes.to_pylist(), strict=True)
            ]
            offsets = chunk.offsets.to_pylist()
            first = offsets[0]
            for row in range(len(chunk)):
                found = [name for name in names[offsets[row] - first : offsets[row + 1] - first] if name is not None]
                if found:
                    yield start + row, found

    def column(self, name: str) -> numpy.ndarray:
        """`num_images`, `num_characters` or `num_answers` of all rows, (rows,) int32."""
        chunks = [chunk.to_numpy() for _, chunk in self._rows.chunks(name)]
        return numpy.concatenate(chunks) if chunks else numpy.empty(0, numpy.int32)

    @property
    def num_problems(self) -> int:
        """Records that are not among the rows."""
        return self._problems.num_rows

    def problems(self) -> Iterator[Problem]:
        """What is wrong with each of these, in the source's order."""
        for _, batch in self._problems.batches():
            yield from (Problem(**row) for row in batch.to_pylist())


class _MappedTable:
    """An Arrow file of which nothing is in memory but what is looked at."""

    def __init__(self, path: Path) -> None:
        self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        sizes = [self._reader.get_batch(number).num_rows for number in range(self._reader.num_record_batches)]
        self._starts = numpy.cumsum([0, *sizes])
        self.num_rows = int(self._starts[-1])

    def value(self, column: str, row: int) -> Any:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        number = int(numpy.searchsorted(self._starts, row, side="right")) - 1
        return self._reader.get_batch(number).column(column)[row - int(self._starts[number])].as_py()

    def batches(self) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        for number in range(self._reader.num_record_batches):
            yield int(self._starts[number]), self._reader.get_batch(number)

    def chunks(self, column: str) -> Iterator[tuple[int, pyarrow.Array]]:
        for start, batch in self.batches():
            yield start, batch.column(column)


class _TableWriter:
    """Writes rows in batches of bounded size."""

    def __init__(self, path: Path, schema: pyarrow.Schema) -> None:
        self._schema = schema
        self._writer = pyarrow.ipc.new_file(str(path), schema)
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, row: dict[str, Any], num_bytes: int) -> None:
        self._rows.append(row)
        self._bytes += num_bytes
        if len(self._rows) >= _ROWS_AT_ONCE or self._bytes >= _BYTES_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pyarrow.RecordBatch.from_pylist(self._rows, self._schema))
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


def _build(source: Source, folder: Path, repair: bool) -> None:
    folder.mkdir()
    rows = _TableWriter(folder / "conversations.arrow", _CONVERSATIONS)
    problems = _TableWriter(folder / "problems.arrow", _PROBLEMS)
    repaired: Counter[str] = Counter()
    digests: list[numpy.ndarray] = []  # of image names: a set of the names themselves would take gigabytes
    waiting: list[int] = []
    position = -1
    with contextlib.closing(rows), contextlib.closing(problems):
        bar = tqdm(source.records(), f"indexing {os.path.basename(source.location)}", unit="record", delay=2)
        for position, record in enumerate(bar):
            try:
                if isinstance(record.value, BadRecord):
                    raise record.value
                checked = check_record(record.value, record.name, record.embedded, repair)
            except BadRecord as problem:
                row = {"name": record.name, "reason": problem.reason, "message": str(problem)}
                problems.add(row, len(row["message"]))
                continue
            repaired.update(checked.repairs)
            waiting += [hash(image if image.path or image.bytes else (position, image)) for image in checked.images]
            if len(waiting) >= _ROWS_AT_ONCE:
                digests.append(numpy.unique(numpy.array(waiting, numpy.int64)))
                waiting = []
            rows.add(*_row(position, record.name, checked))
    if position < 0:
        raise ValueError(f"{source.location} holds no record")
    distinct = numpy.unique(numpy.concatenate([*digests, numpy.array(waiting, numpy.int64)]))
    facts = {"records": position + 1, "repaired": dict(repaired), "distinct_images": len(distinct)}
    write_json_atomically(folder / "index.json", {"source": source.location, **facts})


def _row(position: int, name: str, checked: CheckedRecord) -> tuple[dict[str, Any], int]:
    """A row, and about how many bytes it takes."""
    messages = json.dumps(checked.messages, ensure_ascii=False)
    row = {
        "position": position,
        "name": name,
        "messages": messages,
        "images": [image._asdict() for image in checked.images],
        "num_images": len(checked.images),
        "num_characters": sum(len(part.get("text", "")) for turn in checked.messages for part in turn["content"]),
        "num_answers": sum(turn["role"] == "assistant" for turn in checked.messages),
    }
    return row, len(messages) + sum(len(image.bytes or b"") for image in checked.images)
