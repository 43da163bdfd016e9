"""What the benchmarks share: where official files lie, their records, LLaVA-1.5's prompts, answers from elsewhere."""

from __future__ import annotations

import base64
import binascii
import csv
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answer_files import LLAVA, OWN, AnswerFile, AnswerRow, Format, Imported
from eval.files import read_json, shown
from eval.layouts import exists
from eval.metrics.multiple_choice import LETTERS
from eval.samples import BenchmarkData, Prediction, Sample

SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
_LONGEST_INDEX = 64
"""No image is as short in base64."""


def find_folder(benchmark: str, data_root: Path | None, files: Sequence[str], data_needed: str) -> Path:
    """`data_root`/BENCHMARK or `data_root` itself, whichever holds all `files` (patterns with `*` among them).

    Raises:
        FileNotFoundError: neither does, or there is no `data_root`; the message names the first missing file.
    """
    if data_root is None:
        raise FileNotFoundError(f"{benchmark} needs --data-root DIR: {data_needed}")
    folders = (data_root / benchmark, data_root)
    for folder in folders:
        if all(exists(folder, name) for name in files):
            return folder
    begun = (folder for folder in folders if any(exists(folder, name) for name in files))
    folder = next(begun, folders[0])
    missing = next(name for name in files if not exists(folder, name))
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


def judged(official: str | None, lenient: str | None, sample: Sample) -> dict[str, Any]:
    """The row of a sample that has one right answer: what both readings understood, and whether they are right."""
    return {
        "parsed": official,
        "parsed_lenient": lenient,
        "score": float(official == sample.target),
        "score_lenient": float(lenient == sample.target),
    }


def field(row: Mapping[str, Any], names: Iterable[str], where: str) -> Any:
    """The first of these fields that the row has; ValueError names `where` and the fields."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where}: expected the field {' or '.join(map(repr, names))}, found {shown(sorted(row))}")


def read_records(path: Path, key: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """(place, record) of a file of official data: a JSON list, or the list `key` of a JSON object.

    Raises:
        FileNotFoundError, ValueError: missing or malformed; the message names file and place.
    """
    content = read_json(path)
    rows = content.get(key) if key is not None and isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected {'a list' if key is None else f'an object with a list {key!r}'}")
    return list(located(rows, path))


def located(rows: Iterable[dict[str, Any]], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of the records of a file, counted from 1."""
    for number, row in enumerate(rows, 1):
        where = f"{path}, record {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {shown(row)}")
        yield where, row


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


def recognise(answers: AnswerFile, formats: Sequence[Format]) -> Format:
    """The format whose two fields the first row has; ValueError names those that are known."""
    first = answers.rows[0]
    for known in formats:
        if known.id_field in first.values and known.text_field in first.values:
            return known
    known_formats = " or ".join(map(str, (*formats, OWN)))
    raise ValueError(f"{first.where}: expected the fields of {known_formats}, found {shown(list(first.values))}")


def collect(
    answers: AnswerFile,
    data: BenchmarkData,
    formats: Sequence[Format] = (LLAVA,),
    find_id: Callable[[dict[str, Any], str], str] | None = None,
    leave_out: Callable[[dict[str, Any]], str | None] = lambda row: None,
) -> Imported:
    """Match the rows of an answer file, all of one of `formats`, with the samples.

    Args:
        find_id: (row, place) -> the sample's id; None: it stands in the format's `id_field`.
        leave_out: row -> why it is meant for no sample of this benchmark (it is counted then), or None.

    Raises:
        ValueError: an unknown format; an unknown or repeated sample; a row without id or answer text. The message names
            the record.
    """
    layout = recognise(answers, formats)
    samples = {sample.id: sample for sample in data.samples}
    found: dict[str, Prediction] = {}
    left_out: Counter[str] = Counter()
    for row in answers.rows:
        number = field(row.values, (layout.id_field,), row.where)
        reason = leave_out(row.values)
        if reason is not None:
            left_out[reason] += 1
            continue
        sample_id = str(number) if find_id is None else find_id(row.values, row.where)
        if sample_id not in samples:
            raise ValueError(f"{row.where}: {shown(sample_id)} is no sample of this benchmark")
        if sample_id in found:
            raise ValueError(f"{row.where}: a second prediction for {shown(sample_id)}: keep one")
        found[sample_id] = Prediction(sample_id, _text(row, layout.text_field))
    models = {str(row.values.get("model_id")) for row in answers.rows}
    model = models.pop() if len(models) == 1 and "model_id" in answers.rows[0].values else None
    return Imported(found, str(layout), dict(left_out), model)


def _text(row: AnswerRow, name: str) -> str:
    text = row.values.get(name)
    if not isinstance(text, str):
        raise ValueError(f"{row.where}: {name!r} must be a string, found {shown(text)}")
    return text


def check_question(asked: object, sample: Sample, where: str) -> None:
    """ValueError if `asked` (a question or a prompt, None where the row is silent) lacks the sample's question.

    For rows that are matched by number or by order: an answer to something else must not pass unnoticed.
    """
    if asked is not None and _plain(sample.question) not in _plain(str(asked)):
        raise ValueError(f"{where}: asks {shown(str(asked))}, but {sample.id} is {shown(sample.question)}")


def _plain(text: str) -> str:
    """Lower case, white space collapsed; "imange" is how POPE's first files wrote "image"."""
    return " ".join(text.lower().replace("imange", "image").split())


def importer(*formats: Format) -> Callable[[AnswerFile, BenchmarkData], Imported]:
    """For answer files whose `id_field` is the sample's id."""
    return lambda answers, data: collect(answers, data, formats)
