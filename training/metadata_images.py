"""Labelled pictures as files named by a `metadata.jsonl`, in the ImageFolder convention of Hugging Face `datasets`.

`metadata.jsonl` stands beside the pictures (or above them); each line names one, with either

- `"label"`: a name or a number, one class a picture (`problem_type` "single_label_classification"), or
- `"labels"`: `{"circle": 1, "red": 0, "blue": null}`, attributes that hold, do not hold or are not known, the same
  names on every line (`problem_type` "multi_label_classification"; unknown becomes -1, which the loss ignores).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from defocus_mllm.images import load_image
from training.labelled_data import LabelledData
from training.labels import NAMED_IN_MESSAGE, count_labels, number_attributes, number_classes, raise_first
from training.records import read_records, record_name


@dataclass(frozen=True)
class _LabelledFile:
    record: str
    path: str
    label: Any


class FilePictures:
    """Pictures in files; messages call them by their record, `metadata.jsonl[12]`."""

    def __init__(self, paths: Sequence[str], records: Sequence[str]) -> None:
        self._paths = paths
        self._records = records

    def name(self, index: int) -> str:
        """The record, as messages call it."""
        return self._records[index]

    def load(self, index: int) -> Image.Image:
        """The picture. Raises what `load_image` raises."""
        return load_image(self._paths[index])


def read_metadata(path: Path, on_bad_sample: str) -> LabelledData:
    """Read and check `path`, a `metadata.jsonl`; its `file_name`s are relative to its folder.

    With `on_bad_sample="raise"` a bad line is a ValueError naming file and record, missing pictures being listed
    together in one FileNotFoundError; with "skip" these records are left out, counted and named in the report.
    """
    records = read_records(path)
    kind = _label_key(records[0], path)
    attributes = list(records[0][kind]) if kind == "labels" else []
    files, problems = [], []
    for index, record in enumerate(records):
        try:
            files.append(_check_record(record, record_name(path, index, record), path, kind, attributes))
        except ValueError as problem:
            problems.append(str(problem))
    missing = [f"{file.record}: {file.path}" for file in files if not os.path.isfile(file.path)]
    if on_bad_sample == "raise":
        raise_first(str(path), problems, missing)
    usable = [file for file in files if os.path.isfile(file.path)] if missing else files
    if not usable:
        raise ValueError(f"{path} holds no usable picture: {'; '.join((problems + missing)[:NAMED_IN_MESSAGE])}")
    values, record_names = [file.label for file in usable], [file.record for file in usable]
    if kind == "label":
        labels, names = number_classes(values, record_names, str(path))
    else:
        labels, names = number_attributes(values)
    report = {
        "file": str(path),
        "records": len(records),
        "used": len(usable),
        "left_out": {"bad record": problems, "image missing": missing},
        "label_counts": count_labels(labels, names),
    }
    return LabelledData(FilePictures([file.path for file in usable], record_names), labels, names, report)


def _label_key(first: dict[str, Any], path: Path) -> str:
    keys = [key for key in ("label", "labels") if key in first]
    if len(keys) != 1 or (keys == ["labels"] and not (isinstance(first["labels"], dict) and first["labels"])):
        name = record_name(path, 0, first)
        raise ValueError(f'{path}: {name} needs either "label" (one class) or "labels" (an object of attributes)')
    return keys[0]


def picture_path(record: dict[str, Any], key: str, name: str, folder: Path) -> str:
    """The picture that `record[key]` names, relative to `folder`; `ValueError` naming the record if it lies outside."""
    file_name = record.get(key)
    if not isinstance(file_name, str) or not file_name:
        raise ValueError(f'{name}: "{key}" must be a path, not {file_name!r}')
    root = os.path.abspath(folder)
    picture = os.path.normpath(os.path.join(root, file_name))
    if os.path.commonpath([root, picture]) != root:
        raise ValueError(f"{name}: {file_name!r} lies outside {root}; move it there")
    return picture


def _check_record(record: dict[str, Any], name: str, path: Path, kind: str, attributes: list[str]) -> _LabelledFile:
    image = picture_path(record, "file_name", name, path.parent)
    if kind not in record:
        raise ValueError(f'{name}: lacks "{kind}", which the first record has')
    label = record[kind]
    if kind == "label":
        if not isinstance(label, (str, int)) or isinstance(label, bool) or (isinstance(label, int) and label < 0):
            raise ValueError(f'{name}: "label" must be a name or a number >= 0, not {label!r}')
    elif not isinstance(label, dict) or set(label) != set(attributes):
        raise ValueError(f'{name}: "labels" must have the attributes of the first record: {", ".join(attributes)}')
    elif wrong := [attribute for attribute, value in label.items() if value not in (0, 1, None)]:
        raise ValueError(f'{name}: "labels" of {wrong[0]!r} must be 0, 1 or null, not {label[wrong[0]]!r}')
    return _LabelledFile(name, image, label)
