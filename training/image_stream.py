"""Labelled pictures read in order instead of by position: Parquet row groups, WebDataset shards, or any other table.

Nothing is copied or indexed first, so data may be larger than the memory and the disk cache. The order is random only
as far as shards (row groups, tar files) come in random order and a buffer of undecoded pictures is shuffled.
"""

from __future__ import annotations

import contextlib
import glob
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from datasets.distributed import split_dataset_by_node

from training.sampling import mix_seed
from training.table_images import (
    Columns,
    check_columns,
    check_image_column,
    class_names,
    first_line,
    open_table,
    parquet_files,
)

_READ_ERRORS = (datasets.exceptions.DatasetsError, pyarrow.ArrowException, tarfile.TarError, EOFError)
_ROWS_AT_ONCE = 100
_SHARDS_OF_A_TABLE = 64
_SEED_LIMIT = 2**63


@dataclass(frozen=True)
class RowStream:
    """A data set that is read from its beginning, shard by shard."""

    where: str
    """What is read, as messages call it."""
    rows: datasets.IterableDataset

    def one_pass(self, seed: int, buffer_size: int, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Any]]:
        """All rows that are this process's, in an order that `seed` decides.

        Processes share the shards or, where these are fewer, each takes every `world_size`-th row. Raises `ValueError`
        naming the data where a file turns out to be damaged.
        """
        rows = self.rows
        if buffer_size:
            rows = rows.shuffle(seed=mix_seed(seed) % _SEED_LIMIT, buffer_size=buffer_size)
        if world_size > 1:
            strategy = "shards" if rows.num_shards >= world_size else "examples"
            rows = split_dataset_by_node(rows, rank, world_size, strategy=strategy)
        with one_line_errors(self.where):
            yield from rows


@dataclass(frozen=True)
class ImageStream(RowStream):
    """Rows have the columns `columns.image` (`{"bytes", "path"}`) and `columns.label` (a class number), and what `name`
    needs."""

    columns: Columns
    label_names: list[str]
    name: Callable[[dict[str, Any]], str]
    """Row -> how messages call it: `train.parquet[12]`."""
    may_name_files: bool
    """Whether a picture may be a path instead of bytes."""


def open_stream(data: str | Path, columns: Columns, num_labels: int = 0) -> ImageStream:
    """Parquet files, WebDataset shards (`.tar`), or whatever else `open_table` opens.

    Args:
        data: a file, a folder, or a glob pattern.
        columns: the columns to read; in WebDataset shards, the files' endings, such as "jpg" and "cls".
        num_labels: how many classes there are, for data that does not name them.

    Raises `FileNotFoundError` or `ValueError` naming what cannot be read.
    """
    if Path(data).suffix in (".jsonl", ".json") or (Path(data) / "metadata.jsonl").is_file():
        raise ValueError(f"{data}: pictures named by a metadata.jsonl are opened one by one; leave streaming out")
    with one_line_errors(str(data)):
        if shards := tar_files(data):
            return _webdataset(str(data), shards, columns, num_labels)
        if not (Path(data) / "dataset_info.json").is_file() and (files := parquet_files(data)):
            return _parquet(str(data), files, columns, num_labels)
        return _table(str(data), columns, num_labels)


@contextlib.contextmanager
def one_line_errors(where: str, kinds: tuple[type[Exception], ...] = _READ_ERRORS) -> Iterator[None]:
    """Turn an error of a library in the block into a ValueError of one line that names `where`."""
    try:
        yield
    except kinds as error:  # an argument, because a stream may be closed when the module is gone
        raise ValueError(f"{where} cannot be read: {first_line(error)}") from error


def tar_files(data: str | Path) -> list[str]:
    """The `.tar` files that a file, folder or glob pattern stands for, sorted."""
    path = Path(data)
    files = map(str, path.rglob("*.tar")) if path.is_dir() else [str(path)] if path.is_file() else glob.glob(str(data))
    return sorted(file for file in files if file.endswith(".tar"))


def _webdataset(where: str, shards: list[str], columns: Columns, num_labels: int) -> ImageStream:
    patterns = [glob.escape(shard) for shard in shards]
    rows = datasets.load_dataset("webdataset", data_files=patterns, split="train", streaming=True)
    check_columns(list(rows.features), columns, where)
    check_image_column(rows.features[columns.image], columns.image, where)
    rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    names = _names(rows.features[columns.label], columns, num_labels, where)

    def name(row: dict[str, Any]) -> str:
        return f"{os.path.basename(row['__url__'])}: {row['__key__']}"

    return ImageStream(where, rows, columns, names, name, may_name_files=False)


def _parquet(where: str, files: list[str], columns: Columns, num_labels: int) -> ImageStream:
    groups = [group for file in files for group in row_groups(file)]
    if not groups:
        raise ValueError(f"{where} holds no row")
    features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(files[0]))
    check_columns(list(features), columns, where)
    check_image_column(features[columns.image], columns.image, where)
    names = _names(features[columns.label], columns, num_labels, where)
    rows = datasets.IterableDataset.from_generator(
        _parquet_rows,
        gen_kwargs={"groups": groups, "image": columns.image, "label": columns.label},
    )
    return ImageStream(where, rows, columns, names, lambda row: row["record"], may_name_files=False)


def row_groups(file: str) -> list[tuple[str, int, int]]:
    """(file, number, first row) of each row group."""
    with one_line_errors(file):
        metadata = pyarrow.parquet.read_metadata(file)
    groups, first = [], 0
    for number in range(metadata.num_row_groups):
        groups.append((file, number, first))
        first += metadata.row_group(number).num_rows
    return groups


def _parquet_rows(groups: list[tuple[str, int, int]], image: str, label: str) -> Iterator[dict[str, Any]]:
    for file, number, row in groups:
        with one_line_errors(file):
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_ROWS_AT_ONCE, [number], [image, label]):
                for cells in batch.to_pylist():
                    cell = cells[image]
                    picture = {"bytes": cell, "path": None} if isinstance(cell, bytes) else cell
                    yield {image: picture, label: cells[label], "record": f"{os.path.basename(file)}[{row}]"}
                    row += 1


def _table(where: str, columns: Columns, num_labels: int) -> ImageStream:
    table = open_table(where)
    check_columns(table.rows.column_names, columns, where)
    check_image_column(table.rows.features[columns.image], columns.image, where)
    rows = table.rows.cast_column(columns.image, datasets.Image(decode=False))
    rows = rows.add_column("record", list(range(len(rows))))
    names = _names(rows.features[columns.label], columns, num_labels, where)
    stream = rows.to_iterable_dataset(num_shards=min(len(rows), _SHARDS_OF_A_TABLE))
    return ImageStream(where, stream, columns, names, lambda row: table.name(row["record"]), table.may_name_files)


def _names(feature: Any, columns: Columns, num_labels: int, where: str) -> list[str]:
    names = class_names(feature, columns.label, where)
    if names is None and "string" in feature.dtype:
        raise ValueError(f"{where}: column {columns.label!r} holds names; a stream needs class numbers (a ClassLabel)")
    if names is None and not num_labels:
        raise ValueError(f"{where}: column {columns.label!r} does not name its classes; count them: --num_labels")
    if names is not None and num_labels not in (0, len(names)):
        raise ValueError(f"{where}: column {columns.label!r} has {len(names)} classes; leave num_labels out")
    return names or [str(number) for number in range(num_labels)]
