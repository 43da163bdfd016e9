"""What the loaders of official files share: where files lie, LLaVA-1.5's prompts, answer files of other evaluations."""

from __future__ import annotations

import base64
import binascii
import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.files import read_json, read_json_lines
from eval.metrics.multiple_choice import LETTERS
from eval.samples import BenchmarkData, Prediction, Sample

SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
_LONGEST_INDEX = 64
"""No image is as short in base64."""


def find_folder(benchmark: str, data_root: Path | None, files: Sequence[str], data_needed: str) -> Path:
    """`data_root`/BENCHMARK or `data_root` itself, whichever holds all `files`.

    Raises:
        FileNotFoundError: neither does, or there is no `data_root`; the message names the first missing file.
    """
    if data_root is None:
        raise FileNotFoundError(f"{benchmark} needs --data-root DIR: {data_needed}")
    folders = (data_root / benchmark, data_root)
    for folder in folders:
        if all((folder / name).exists() for name in files):
            return folder
    folder = next((folder for folder in folders if folder.is_dir()), data_root)
    missing = next(name for name in files if not (folder / name).exists())
    raise FileNotFoundError(f"{folder / missing}: no such file: {data_needed}")


def find_layout(
    benchmark: str, data_root: Path | None, layouts: Sequence[Sequence[str]], data_needed: str
) -> tuple[Path, Sequence[str]]:
    """The first of several layouts (lists of files) that is there, with its folder as `find_folder` finds it.

    Raises:
        FileNotFoundError: none is there whole; the message names the first missing file of the first layout.
    """
    missing = []
    for files in layouts:
        try:
            return find_folder(benchmark, data_root, files, data_needed), files
        except FileNotFoundError as error:
            missing.append(error)
    raise missing[0]


def short_prompt(sample: Sample) -> str:
    """LLaVA-1.5's prompt for short answers."""
    return sample.question + SHORT_SUFFIX


def letter_prompt(sample: Sample) -> str:
    """LLaVA-1.5's prompt for multiple choice; a hint or context is part of `question`."""
    options = (f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, sample.choices, strict=False))
    return sample.question + "".join(options) + LETTER_SUFFIX


def field(row: Mapping[str, Any], names: Iterable[str], where: str) -> Any:
    """The first of these fields that the row has; ValueError names `where` and the fields."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where}: expected the field {' or '.join(map(repr, names))}, found {sorted(row)}")


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of an answer file: a table (.tsv), a JSON list, or JSON Lines.

    Raises:
        FileNotFoundError, ValueError: missing or malformed; the message names file and place.
    """
    if path.suffix == ".tsv":
        return read_table(path)
    if path.is_file() and path.read_bytes()[:1] == b"[":
        rows = read_json(path)
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: expected a list of JSON objects")
        return list(rows)
    return read_json_lines(path)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a tab-separated file with a header, but not its column `image`; errors as `table_rows`."""
    return [{name: value for name, value in row.items() if name != "image"} for row in table_rows(path)]


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a tab-separated file with a header, one at a time, for images stand in some of these tables.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a row with another number of columns than the header has.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    csv.field_size_limit(sys.maxsize)  # an image in base64 is longer than the module's limit
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t"), 1):
            if None in row or None in row.values():
                raise ValueError(f"{path}, record {number}: another number of columns than the header has")
            yield row


def table_images(path: Path, indices: Mapping[str, str], referred: bool = False) -> Iterator[tuple[str, bytes]]:
    """Images of the column `image`, in base64; instead of an image the `index` of the row that holds it may stand.

    Args:
        path: a table for `table_rows`.
        indices: name of an image -> `index` of its row.
        referred: these rows were referred to, and must hold images themselves.

    Raises:
        ValueError: a value that is not base64; the message names the row.
    """
    names: dict[str, list[str]] = {}
    for name, index in indices.items():
        names.setdefault(index, []).append(name)
    elsewhere = {}
    for row in table_rows(path):
        value = row.get("image") or ""
        for name in names.get(row["index"], ()) if value else ():
            if len(value) <= _LONGEST_INDEX and not referred:
                elsewhere[name] = value
                continue
            try:
                yield name, base64.b64decode(value, validate=True)
            except binascii.Error as error:
                raise ValueError(f"{path}, index {row['index']}: 'image' is not base64: {error}") from error
    if elsewhere:
        yield from table_images(path, elsewhere, referred=True)


def collect(
    path: Path,
    data: BenchmarkData,
    find_id: Callable[[dict[str, Any], str], str],
    text_fields: Sequence[str] = ("text", "answer"),
    rows: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Prediction]:
    """Read an answer file; `find_id(row, where)` gives the sample's id, the first of `text_fields` its answer.

    `rows` are those to take, where not all are meant.

    Raises:
        ValueError: an unknown or repeated sample, or a row without answer text; the message names the record.
    """
    known = {sample.id for sample in data.samples}
    found: dict[str, Prediction] = {}
    for number, row in enumerate(read_answers(path) if rows is None else rows, 1):
        where = f"{path}, record {number}"
        sample_id = find_id(row, where)
        if sample_id not in known:
            raise ValueError(f"{where}: {sample_id!r} is no sample of this benchmark")
        if sample_id in found:
            raise ValueError(f"{where}: a second prediction for {sample_id!r}: keep one")
        text = field(row, text_fields, where)
        found[sample_id] = Prediction.from_row({"id": sample_id, "text": text}, where)
    return found


def by_question_id(path: Path, data: BenchmarkData) -> dict[str, Prediction]:
    """Answer files whose `question_id` (or `questionId`) is the sample's id."""
    return collect(
        path,
        data,
        lambda row, where: str(field(row, ("question_id", "questionId"), where)),
        ("text", "answer", "prediction"),
    )
