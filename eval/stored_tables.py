"""Tables of the `datasets` library on disk, Parquet or Arrow: rows without the bytes of their images, images by row.

Read with pyarrow alone: nothing is decoded, copied into a second cache or looked up on the internet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_AT_ONCE = 64
_PIECE = tuple[int, pa.RecordBatch]
"""The number of the first row, within its file, and the rows."""


@dataclass(frozen=True)
class StoredTable:
    """The files of one split, in order."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        """Number of rows; errors as `rows`."""
        return sum(map(_number_of_rows, self.files))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row; for a column of images (or of lists of them) its value is their number, 0 where there is none.

        Raises:
            ValueError: a file is damaged; the message names it.
        """
        for file in self.files:
            for _, piece in _pieces(file, images=False):
                yield from piece.to_pylist()

    def images(self, wanted: Collection[int]) -> Iterator[tuple[int, list[bytes]]]:
        """The image files in these rows: (number of the row, its images in the order of columns and lists).

        Raises:
            ValueError: a file is damaged, or names an image instead of holding it.
        """
        first = 0
        for file in self.files:
            size = _number_of_rows(file)
            here = sorted(row - first for row in wanted if first <= row < first + size)
            for row, cells in _rows_of_images(file, here):
                yield first + row, [_content(cell, file, row) for cell in cells]
            first += size


def _content(cell: dict[str, Any], file: Path, row: int) -> bytes:
    if cell.get("bytes") is None:
        raise ValueError(f"{file}, row {row + 1}: names the image {cell.get('path')!r}, but does not hold it")
    return bytes(cell["bytes"])


def _rows_of_images(file: Path, wanted: Sequence[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    waiting = set(wanted)
    for first, piece in _pieces(file, images=True, wanted=waiting) if wanted else ():
        for row in sorted(waiting & set(range(first, first + piece.num_rows))):
            values = piece.slice(row - first, 1).to_pylist()[0].values()
            cells = [cell for value in values for cell in (value if isinstance(value, list) else [value])]
            yield row, [cell for cell in cells if cell is not None]


def _number_of_rows(file: Path) -> int:
    try:
        if file.suffix == ".parquet":
            return int(pq.read_metadata(file).num_rows)
        return sum(piece.num_rows for _, piece in _arrow_pieces(file))
    except pa.ArrowException as error:
        raise ValueError(f"{file}: damaged: {error}") from error


def _pieces(file: Path, images: bool, wanted: Collection[int] | None = None) -> Iterator[_PIECE]:
    """Pieces of a file with its images only, or with all else and their numbers; only those that hold `wanted` rows."""
    try:
        if file.suffix == ".parquet":
            yield from _parquet_pieces(file, images, wanted)
            return
        for first, piece in _arrow_pieces(file):
            if wanted is None or not set(range(first, first + piece.num_rows)).isdisjoint(wanted):
                names = _image_columns(piece.schema)
                yield first, piece.select(names) if images else _with_numbers(piece, names)
    except pa.ArrowException as error:
        raise ValueError(f"{file}: damaged: {error}") from error


def _arrow_pieces(file: Path) -> Iterator[_PIECE]:
    first = 0
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
        for piece in stream:
            yield first, piece
            first += piece.num_rows


def _parquet_pieces(file: Path, images: bool, wanted: Collection[int] | None) -> Iterator[_PIECE]:
    """Reads only the leaves it needs: the bytes of images are most of a file."""
    with pq.ParquetFile(file) as table:
        names = set(_image_columns(table.schema_arrow))
        leaves = [table.schema.column(place).path for place in range(len(table.schema))]
        if images:
            leaves = [leaf for leaf in leaves if leaf.split(".")[0] in names]
        else:
            leaves = [leaf for leaf in leaves if not (leaf.split(".")[0] in names and leaf.endswith(".bytes"))]
        first = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if wanted is None or not set(range(first, first + size)).isdisjoint(wanted):
                at = first
                for piece in table.iter_batches(_ROWS_AT_ONCE, [group], leaves):
                    yield at, piece if images else _with_numbers(piece, names)
                    at += piece.num_rows
            first += size


def _image_columns(schema: pa.Schema) -> list[str]:
    return [column.name for column in schema if _holds_images(column.type)]


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _with_numbers(piece: pa.RecordBatch, names: Collection[str]) -> pa.RecordBatch:
    """The rows with the number of images in place of each column of images."""
    columns = dict(zip(piece.schema.names, piece.columns, strict=True))
    for name in names:
        column = columns[name]
        if pa.types.is_struct(column.type):
            columns[name] = column.is_valid().cast(pa.int64())
        else:
            columns[name] = pa.array([length or 0 for length in column.value_lengths().to_pylist()], pa.int64())
    return pa.RecordBatch.from_pydict(columns)
