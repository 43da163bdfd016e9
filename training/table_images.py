"""Labelled pictures in a data set of Hugging Face `datasets`: Parquet, class folders, or one written by `save_to_disk`.

A row holds a picture (`{"bytes", "path"}`, the format of `datasets.Image`) and one class: a number of a `ClassLabel`,
whose names are kept, a plain number, or a name.
"""

from __future__ import annotations

import bisect
import glob
import io
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from defocus_mllm.images import ImageError, decode_image, load_image
from training.labelled_data import LabelledData
from training.labels import NAMED_IN_MESSAGE, count_labels, number_classes, raise_first


@dataclass(frozen=True)
class Columns:
    """Names of the two columns that are read."""

    image: str = "image"
    label: str = "label"


DEFAULT_COLUMNS = Columns()


@dataclass(frozen=True)
class Table:
    """A data set that was opened, with what only its format knows."""

    rows: datasets.Dataset
    name: Callable[[int], str]
    """Position -> how messages call the row."""
    may_name_files: bool
    """Whether a picture may be a path instead of bytes; not in Parquet, which comes from strangers."""
    other_files: list[str] = field(default_factory=list)
    """Files of the folder that are no pictures."""


class TablePictures:
    """Pictures in the column `column` of `table`, at the positions `rows`."""

    def __init__(self, table: Table, column: str, rows: Sequence[int]) -> None:
        self._table = table
        self._cells = table.rows.select_columns([column])
        self._column = column
        self._rows = rows

    def name(self, index: int) -> str:
        """File and row, or the picture's own file."""
        return self._table.name(self._rows[index])

    def load(self, index: int) -> Image.Image:
        """The picture. Raises `ImageError` or `FileNotFoundError`."""
        return open_picture(self._cells[self._rows[index]][self._column], self._table.may_name_files)


def read_table(data: str | Path, columns: Columns, on_bad_sample: str) -> LabelledData:
    """Open `data` with `open_table` and check every label; pictures are only opened later.

    Raises `ValueError` naming file and row for a label that is absent or out of range, unless `on_bad_sample` is
    "skip": then such rows are left out, counted and named in the report.
    """
    table = open_table(data)
    check_columns(table.rows.column_names, columns, str(data))
    check_image_column(table.rows.features[columns.image], columns.image, str(data))
    rows = table.rows.cast_column(columns.image, datasets.Image(decode=False))
    table = replace(table, rows=rows)
    names = class_names(rows.features[columns.label], columns.label, str(data))
    values = rows[columns.label][:]
    bad = {row: problem for row, value in enumerate(values) if (problem := label_problem(value, names))}
    problems = [f"{table.name(row)}: {columns.label!r} {problem}" for row, problem in bad.items()]
    if on_bad_sample == "raise":
        raise_first(str(data), problems)
    usable: Sequence[int] = [row for row in range(len(values)) if row not in bad] if bad else range(len(values))
    if not usable:
        raise ValueError(f"{data} holds no usable picture{': ' if bad else ''}{'; '.join(problems[:NAMED_IN_MESSAGE])}")
    values = [values[row] for row in usable]
    if names is None:
        labels, names = number_classes(values, [table.name(row) for row in usable], str(data))
    else:
        labels = torch.tensor(values)
    report = {
        "file": str(data),
        "records": len(rows),
        "used": len(usable),
        "left_out": {"bad label": problems, "not an image file": table.other_files},
        "label_counts": count_labels(labels, names),
    }
    return LabelledData(TablePictures(table, columns.image, usable), labels, names, report)


def open_picture(cell: dict[str, Any] | None, may_name_file: bool) -> Image.Image:
    """The picture of a cell `{"bytes", "path"}`. Raises `ImageError` or `FileNotFoundError`."""
    cell = cell or {}
    if cell.get("bytes") is not None:
        return decode_image(io.BytesIO(cell["bytes"]), repr(cell.get("path") or ""))
    if cell.get("path") and may_name_file:
        return load_image(cell["path"])
    raise ImageError("there are no image bytes; write the image itself into the data, not its path")


def check_columns(found: Sequence[str], columns: Columns, where: str) -> None:
    """Raise `ValueError` naming the argument and the columns there are."""
    for argument, column in (("image_column", columns.image), ("label_column", columns.label)):
        if column not in found:
            raise ValueError(f"{where}: no column {column!r}; it has {', '.join(found)}; name one with --{argument}")


def check_image_column(feature: Any, column: str, where: str) -> None:
    """Raise `ValueError` unless the column holds pictures: `datasets.Image`, or bytes with or without a path."""
    if not isinstance(feature, datasets.Image):
        kinds = feature if isinstance(feature, dict) else {"bytes": feature}
        if not {"bytes"} <= set(kinds) <= {"bytes", "path"} or "binary" not in getattr(kinds["bytes"], "dtype", ""):
            raise ValueError(f"{where}: column {column!r} must hold images (bytes, or bytes and path), not {feature}")


def class_names(feature: Any, column: str, where: str) -> list[str] | None:
    """Names of a `ClassLabel`, None for plain numbers or names. Raises `ValueError` for any other column."""
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    kind = getattr(feature, "dtype", "")
    if not isinstance(feature, datasets.Value) or not kind.startswith(("int", "uint", "string", "large_string")):
        raise ValueError(f"{where}: column {column!r} must hold class numbers or names, not {feature}")
    return None


def label_problem(value: Any, names: list[str] | None) -> str:
    """What is wrong with a label; empty if nothing is."""
    if value is None:
        return "is null"
    if isinstance(value, int) and (value < 0 or (names is not None and value >= len(names))):
        return f"is {value}, " + ("below 0" if names is None else f"not from 0 to {len(names) - 1}")
    return ""


# --- the formats ------------------------------------------------------------------------------------------------------


def open_table(data: str | Path) -> Table:
    """The rows of a Parquet file, of all Parquet files of a glob or folder, of class folders, or of a saved data set.

    Raises `FileNotFoundError` or `ValueError` naming what cannot be read.
    """
    path = Path(data)
    try:
        if (path / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(str(path))
            return Table(rows, lambda row: f"{path.name}[{row}]", may_name_files=True)
        files = parquet_files(data)
        if files:
            return _open_parquet(files)
        return _open_class_folders(path)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise ValueError(f"{data} cannot be read: {first_line(error)}") from error


def parquet_files(data: str | Path) -> list[str]:
    """The Parquet files that `data` stands for, sorted; empty for a folder without any.

    Raises `FileNotFoundError` if `data` is neither a file, nor a folder, nor a pattern that matches something, and
    `ValueError` for a file of another format or a folder of several data sets.
    """
    path = Path(data)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = ", ".join(sorted(part.name for part in path.iterdir() if part.is_dir()))
            raise ValueError(f"{data} holds several data sets; name the folder of one: {splits}")
        return sorted(str(file) for file in path.rglob("*.parquet"))
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(data), recursive=True))
    if not files:
        raise FileNotFoundError(f"data {data} does not exist")
    for file in files:
        if not file.endswith(".parquet"):
            raise ValueError(f"{file}: not a metadata.jsonl, a Parquet file (.parquet) or a folder of images")
    return files


def _open_parquet(files: list[str]) -> Table:
    counts = []
    for file in files:
        try:
            counts.append(pyarrow.parquet.read_metadata(file).num_rows)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file} is no whole Parquet file: {first_line(error)}") from error
    starts = [0, *itertools.accumulate(counts)]

    def name(row: int) -> str:
        number = bisect.bisect_right(starts, row) - 1
        return f"{os.path.basename(files[number])}[{row - starts[number]}]"

    patterns = [glob.escape(file) for file in files]
    return Table(datasets.load_dataset("parquet", data_files=patterns, split="train"), name, may_name_files=False)


def _open_class_folders(path: Path) -> Table:
    pattern = f"{glob.escape(str(path))}/**"
    try:
        rows = datasets.load_dataset(
            "imagefolder", data_files=[pattern], split="train", drop_labels=False, drop_metadata=True
        )
    except ValueError as error:
        raise ValueError(f"{path} holds no images: {first_line(error)}") from error
    cells = rows.cast_column("image", datasets.Image(decode=False))["image"][:]
    names = [os.path.relpath(cell["path"], path) for cell in cells]
    if loose := [name for name in names if not os.path.dirname(name)]:
        raise ValueError(f"{path}: {loose[0]} must lie in the subfolder of its class, or be named by a metadata.jsonl")
    files = (os.path.relpath(file, path) for file in path.rglob("*") if file.is_file())
    return Table(rows, names.__getitem__, may_name_files=True, other_files=sorted(set(files) - set(names)))


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
