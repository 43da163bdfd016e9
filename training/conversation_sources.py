"""Where conversations come from: JSON, tables of `datasets` (Parquet, a saved data set), WebDataset shards.

A source gives its records in order and reads images that lie in it by position, so that nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute

from defocus_mllm.files import file_sha256
from defocus_mllm.images import ImageError
from training.conversation_records import BadRecord, ImageReference
from training.image_stream import one_line_errors, tar_files
from training.records import LARGEST_RECORD, MalformedLine, iterate_records, record_name, shorten
from training.table_images import Table, open_table, parquet_files

RECORD_COLUMNS = ("conversations", "messages")
IMAGE_COLUMNS = ("image", "images")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")

_ROWS_AT_ONCE = 500


@dataclass(frozen=True)
class SourceRecord:
    """One record as it was read."""

    name: str
    """How messages call it."""
    value: Any
    """The object, or a `BadRecord` that says why it could not be read."""
    embedded: list[ImageReference] | None = None
    """Its images, if they do not stand in the record itself."""


class Source(ABC):
    """Records in order; `location` is what the user named."""

    location: str

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the content does."""

    @abstractmethod
    def records(self) -> Iterator[SourceRecord]:
        """All of them. Raises ValueError naming the file where the rest cannot be read."""

    def read_image(self, record: int, place: int) -> bytes:
        """The image at `place` of the record number `record`, of a source whose images lie in its rows."""
        raise NotImplementedError


def open_source(location: str | Path) -> Source:
    """A `.json` or `.jsonl` file; `.tar` shards; Parquet files; a folder written by `save_to_disk`; a glob of shards
    or Parquet files, or a folder of them.

    Raises FileNotFoundError or ValueError naming `location`.
    """
    path = Path(location)
    if path.is_file() and path.suffix not in (".parquet", ".tar"):
        return JsonSource(path)
    if shards := tar_files(location):
        return ShardSource(str(location), shards)
    if (path / "dataset_info.json").is_file() or parquet_files(location):
        return TableSource(str(location))
    raise ValueError(
        f"{location} holds no conversations: neither Parquet files, nor .tar shards, nor a data set written by "
        "save_to_disk; name a .json or .jsonl file itself"
    )


class JsonSource(Source):
    """A JSON list or JSON Lines."""

    def __init__(self, path: Path) -> None:
        self.location, self._path = str(path), path

    def fingerprint(self) -> str:
        """SHA-256 of the bytes."""
        return file_sha256(self._path)

    def records(self) -> Iterator[SourceRecord]:
        """A line of JSON Lines that is not JSON is one bad record; a JSON list ends there with ValueError."""
        for index, value in enumerate(iterate_records(self._path)):
            name = record_name(self._path, index, value)
            if isinstance(value, MalformedLine):
                value = BadRecord("malformed JSON", f"{name}: {value}")
            yield SourceRecord(name, value)


class TableSource(Source):
    """Rows with a column `conversations` or `messages` and, if there are images, `image` or `images`.

    Images are bytes, `{"bytes", "path"}`, paths below the image root, or lists of these.
    """

    def __init__(self, location: str) -> None:
        self.location = location

    def fingerprint(self) -> str:
        """Of names, sizes and times: the files may be larger than one wants to read twice."""
        path = Path(self.location)
        saved = (path / "dataset_info.json").is_file()
        files = [file for file in path.rglob("*") if file.is_file()] if saved else parquet_files(self.location)
        return _listing_sha256(sorted(map(str, files)))

    @cached_property
    def _table(self) -> Table:
        return open_table(self.location)

    @cached_property
    def _image_column(self) -> str | None:
        found = [name for name in IMAGE_COLUMNS if name in self._table.rows.column_names]
        if len(found) > 1:
            raise ValueError(f"{self.location}: has both columns {' and '.join(found)}; keep one")
        return found[0] if found else None

    def records(self) -> Iterator[SourceRecord]:
        """Raises ValueError naming the columns if none holds conversations."""
        columns = self._table.rows.column_names
        if not set(RECORD_COLUMNS) & set(columns):
            raise ValueError(f"{self.location}: no column {' or '.join(RECORD_COLUMNS)}; it has {', '.join(columns)}")
        names = [name for name in ("id", *RECORD_COLUMNS, self._image_column) if name in columns]
        number = 0
        for batch in self._table.rows.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE):
            images: list[list[ImageReference] | None] = [None] * len(batch)
            if self._image_column:
                images = list(_images_of_rows(batch[self._image_column].combine_chunks()))
                batch = batch.drop_columns([self._image_column])
            for row, embedded in zip(batch.to_pylist(), images, strict=True):
                file, _, rest = self._table.name(number).partition("[")
                identifier = record_name(file, 0, row).partition("]")[2]
                yield SourceRecord(f"{file}[{rest}{identifier}", row, embedded)
                number += 1

    def read_image(self, record: int, place: int) -> bytes:
        """The bytes of a cell, copied out of the memory-mapped table."""
        cell = self._cells[record][self._image_column][0].as_py()
        image = cell[place] if isinstance(cell, list) else cell
        return image["bytes"] if isinstance(image, dict) else image

    @cached_property
    def _cells(self) -> Any:
        return self._table.rows.select_columns([self._image_column]).with_format("arrow")


class ShardSource(Source):
    """WebDataset shards: files of one name but for the ending are one sample, `.json` its record, others its images.

    The images take the order they have in the shard; paths in the record are not looked at.
    """

    def __init__(self, location: str, shards: Sequence[str]) -> None:
        self.location, self._shards = location, [os.path.abspath(shard) for shard in shards]

    def fingerprint(self) -> str:
        """Of names, sizes and times of the shards."""
        return _listing_sha256(self._shards)

    def records(self) -> Iterator[SourceRecord]:
        """Raises ValueError naming the shard that is damaged."""
        for shard in self._shards:
            with one_line_errors(shard), tarfile.open(shard, "r:") as archive:
                yield from _samples(archive, shard)


def _samples(archive: tarfile.TarFile, shard: str) -> Iterator[SourceRecord]:
    key: str | None = None
    record: Any = None
    images: list[ImageReference] = []
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # it would remember every member of the shard
        if not member.isfile():
            continue
        folder, file = os.path.split(member.name)
        stem, _, ending = file.partition(".")
        if os.path.join(folder, stem) != key:
            if key is not None:
                yield _sample(shard, key, record, images)
            key, record, images = os.path.join(folder, stem), None, []
        if ending.lower() == "json":
            record = _member_json(archive, member)
        elif ending.lower().rpartition(".")[2] in IMAGE_SUFFIXES:
            images.append(ImageReference(shard, member.offset_data, member.size))
    if key is not None:
        yield _sample(shard, key, record, images)


def _sample(shard: str, key: str, record: Any, images: list[ImageReference]) -> SourceRecord:
    identifier = record_name(shard, 0, record).partition("]")[2]
    name = f"{os.path.basename(shard)}[{shorten(key)}]{identifier}"
    if record is None:
        record = BadRecord("no record in the shard", f"{name}: has no file {shorten(key)}.json")
    elif isinstance(record, MalformedLine):
        record = BadRecord("malformed JSON", f"{name}: malformed JSON: {record}")
    return SourceRecord(name, record, images)


def _member_json(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    stream = archive.extractfile(member)
    if stream is None or member.size > LARGEST_RECORD:
        return MalformedLine(f"it has {member.size:,} bytes, more than {LARGEST_RECORD:,}")
    try:
        return json.loads(stream.read())
    except (ValueError, RecursionError) as error:
        return MalformedLine(shorten(str(error)))


def read_slice(path: str, offset: int, size: int) -> bytes:
    """A picture inside a shard. Raises `ImageError` if the shard ends before it."""
    with open(path, "rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) < size:
        raise ImageError(f"{path} ends in the middle of it")
    return content


def _images_of_rows(column: pyarrow.Array) -> list[list[ImageReference]]:
    """The images of each row of an image column, without copying their bytes."""
    valid = column.is_valid().to_pylist()
    if not pyarrow.types.is_list(column.type) and not pyarrow.types.is_large_list(column.type):
        cells = _cell_references(column)
        return [[cell] if is_valid and cell else [] for cell, is_valid in zip(cells, valid, strict=True)]
    lengths = pyarrow.compute.list_value_length(column).fill_null(0).to_pylist()
    cells = _cell_references(column.flatten())
    rows, start = [], 0
    for length in lengths:
        row = enumerate(cells[start : start + length])
        rows.append([cell if cell.path else cell._replace(offset=place) for place, cell in row if cell])
        start += length
    return rows


def _cell_references(cells: pyarrow.Array) -> list[ImageReference | None]:
    """For each cell: that its bytes are there, or its path; None where there is neither."""
    kind = cells.type
    if pyarrow.types.is_struct(kind):
        fields = {kind.field(number).name for number in range(kind.num_fields)}
        held = cells.field("bytes").is_valid().to_pylist() if "bytes" in fields else [False] * len(cells)
        paths = cells.field("path").to_pylist() if "path" in fields else [None] * len(cells)
    elif pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        held, paths = cells.is_valid().to_pylist(), [None] * len(cells)
    elif pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        held, paths = [False] * len(cells), cells.to_pylist()
    elif pyarrow.types.is_null(kind):
        return [None] * len(cells)
    else:
        raise ValueError(f"the image column must hold images (bytes, or bytes and path) or paths, not {kind}")
    return [
        ImageReference(offset=0) if has_bytes else ImageReference(path=path) if path else None
        for has_bytes, path in zip(held, paths, strict=True)
    ]


def _listing_sha256(files: Sequence[str]) -> str:
    lines = []
    for file in files:
        status = os.stat(file)
        lines.append(f"{os.path.abspath(file)} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
