"""Pictures with a text each, for contrastive pre-training: files named by a `metadata.jsonl`, or Parquet.

A record is `{"file_name": "cats/7.jpg", "text": "two cats on a sofa"}` (the ImageFolder convention of Hugging Face
`datasets`), also under the names "image" and "caption"; in Parquet a column holds the pictures themselves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from training.images import CACHE_BYTES, PixelLoader
from training.labelled_data import Pictures
from training.labels import NAMED_IN_MESSAGE, raise_first
from training.metadata_images import FilePictures, picture_path
from training.picture_set import PictureSet
from training.records import read_records, record_name
from training.table_images import Table, TablePictures, open_table

IMAGE_COLUMNS = ("image", "file_name")
TEXT_COLUMNS = ("text", "caption")


@dataclass(frozen=True)
class CaptionColumns:
    """Names of the two fields that are read; empty: the one of `IMAGE_COLUMNS` and of `TEXT_COLUMNS` there is."""

    image: str = ""
    text: str = ""

    def found_in(self, names: Sequence[str], where: str) -> tuple[str, str]:
        """(image, text) among `names`. Raises `ValueError` naming the argument and the fields there are."""
        image = _choose(self.image, IMAGE_COLUMNS, names, "image_column", where)
        return image, _choose(self.text, TEXT_COLUMNS, names, "text_column", where)


DEFAULT_COLUMNS = CaptionColumns()


class CaptionedImages(PictureSet):
    """Pictures and their texts by position, read and checked.

    Args:
        pictures: the pictures.
        texts: their texts, none of them empty.
        report: what was found and what was left out: `file`, `records`, `used`, `left_out` by cause.
        loader: brings the pictures to the encoder's size and remembers them.
    """

    def __init__(self, pictures: Pictures, texts: Sequence[str], report: dict[str, Any], loader: PixelLoader) -> None:
        super().__init__(pictures, report, loader)
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)


def load_captioned_images(
    data: str | Path,
    image_processor: Any,
    on_bad_sample: str = "raise",
    cache_bytes: int = CACHE_BYTES,
    columns: CaptionColumns = DEFAULT_COLUMNS,
) -> CaptionedImages:
    """Read and check the pictures and texts of `data`: a `metadata.jsonl` or a folder with one, or Parquet.

    With `on_bad_sample="raise"` a bad record is an error naming file and record; with "skip" such records are left
    out, counted and named in the report.
    """
    path = Path(data)
    if (path / "metadata.jsonl").is_file():
        path = path / "metadata.jsonl"
    loader = PixelLoader(image_processor, cache_bytes)
    if path.suffix in (".jsonl", ".json"):
        return CaptionedImages(*_read_metadata(path, columns, on_bad_sample), loader)
    return CaptionedImages(*_read_table(data, columns, on_bad_sample), loader)


def format_report(report: dict[str, Any]) -> str:
    """The report of a dataset in a few lines for the log; every record left out is named."""
    lines = [f"{report['file']}: {report['records']} records, {report['used']} used"]
    for reason, messages in report["left_out"].items():
        if messages:
            lines += [f"left out, {reason}: {len(messages)}", *(f"  {message}" for message in messages)]
    return "\n".join(lines)


def _choose(given: str, usual: Sequence[str], names: Sequence[str], field: str, where: str) -> str:
    candidates = [given] if given else list(usual)
    found = [name for name in candidates if name in names]
    if len(found) == 1:
        return found[0]
    problem = f"has both {' and '.join(found)}" if found else f"has no {' or '.join(map(repr, candidates))}"
    raise ValueError(f"{where}: {problem} among {', '.join(names)}; name one with --{field}")


def _text_problem(text: Any) -> str:
    """What is wrong with a text; empty if nothing is."""
    if not isinstance(text, str):
        return f"must be a text, not {text!r}"
    return "" if text.strip() else "is empty"


Read = tuple[Pictures, Sequence[str], dict[str, Any]]


def _read_metadata(path: Path, columns: CaptionColumns, on_bad_sample: str) -> Read:
    records = read_records(path)
    image_key, text_key = columns.found_in(list(records[0]), f"{path}: {record_name(path, 0, records[0])}")
    read, problems, missing = [], [], []
    for index, record in enumerate(records):
        name = record_name(path, index, record)
        try:
            file = picture_path(record, image_key, name, path.parent)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problem := _text_problem(record.get(text_key)):
            problems.append(f'{name}: "{text_key}" {problem}')
        elif not os.path.isfile(file):
            missing.append(f"{name}: {file}")
        else:
            read.append((file, name, record[text_key]))
    if on_bad_sample == "raise":
        raise_first(str(path), problems, missing)
    if not read:
        raise ValueError(f"{path} holds no usable pair: {'; '.join((problems + missing)[:NAMED_IN_MESSAGE])}")
    files, names, texts = (list(column) for column in zip(*read, strict=True))
    report = {
        "file": str(path),
        "records": len(records),
        "used": len(read),
        "left_out": {"bad record": problems, "image missing": missing},
    }
    return FilePictures(files, names), texts, report


def _read_table(data: str | Path, columns: CaptionColumns, on_bad_sample: str) -> Read:
    table = open_table(data)
    image, text = columns.found_in(table.rows.column_names, str(data))
    rows = table.rows.cast_column(image, datasets.Image(decode=False))
    bad = {row: problem for row, value in enumerate(rows[text]) if (problem := _text_problem(value))}
    problems = [f"{table.name(row)}: {text!r} {problem}" for row, problem in bad.items()]
    if on_bad_sample == "raise":
        raise_first(str(data), problems)
    usable: Sequence[int] = [row for row in range(len(rows)) if row not in bad] if bad else range(len(rows))
    if not usable:
        raise ValueError(f"{data} holds no usable pair{': ' if bad else ''}{'; '.join(problems[:NAMED_IN_MESSAGE])}")
    report = {"file": str(data), "records": len(rows), "used": len(usable), "left_out": {"bad text": problems}}
    pictures = TablePictures(Table(rows, table.name, table.may_name_files), image, usable)
    # a column of `datasets` reads from disk what is asked for; a list of all texts might not fit into memory
    return pictures, rows.select(usable)[text] if bad else rows[text], report
