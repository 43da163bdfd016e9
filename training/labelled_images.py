"""Labelled pictures for stage 0, in the ImageFolder convention of Hugging Face `datasets`.

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

import torch
from torch.utils.data import Dataset

from defocus_mllm.images import ImageError
from training.images import PixelLoader
from training.records import read_records, record_name

UNKNOWN = -1.0
_NAMED_IN_MESSAGE = 20


@dataclass(frozen=True)
class _LabelledFile:
    record: str
    path: str
    label: Any


class LabelledImageDataset(Dataset[dict[str, torch.Tensor]]):
    """Samples `{"pixel_values": (3, height, width), "labels": () long or (num_labels,) float}`."""

    def __init__(
        self,
        paths: list[str],
        labels: torch.Tensor,
        label_names: list[str],
        pixels: PixelLoader,
        report: dict[str, Any],
        records: list[str],
    ) -> None:
        self.paths = paths
        self.records = records
        """Where each picture comes from, for messages: `metadata.jsonl[12]`."""
        self.labels = labels
        """(samples,) long: the class; or (samples, num_labels) float: 1 holds, 0 does not, -1 unknown."""
        self.label_names = label_names
        """Names of the classes or attributes, in the order of the labels."""
        self.report = report
        """What was found and what was left out."""
        self._pixels = pixels

    @property
    def problem_type(self) -> str:
        """What the encoder configuration's `problem_type` must be."""
        return "single_label_classification" if self.labels.ndim == 1 else "multi_label_classification"

    @property
    def id2label(self) -> dict[int, str]:
        """For the encoder's configuration."""
        return dict(enumerate(self.label_names))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        try:
            return {"pixel_values": self._pixels(self.paths[index]), "labels": self.labels[index]}
        except (ImageError, FileNotFoundError) as error:
            raise type(error)(f"{self.report['file']}: {self.records[index]}: {error}") from error


def collate_labelled_images(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`pixel_values` (batch, 3, height, width) and `labels` (batch,) or (batch, num_labels)."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("pixel_values", "labels")}


def load_labelled_images(
    path: str | Path, image_processor: Any, on_bad_sample: str = "raise", cache_bytes: int = 512 * 1024**2
) -> LabelledImageDataset:
    """Read and check `path`, a `metadata.jsonl`; its `file_name`s are relative to its folder.

    With `on_bad_sample="raise"` a bad line is a ValueError naming file and record, missing pictures being listed
    together in one FileNotFoundError; with "skip" these records are left out, counted and named in `report`.
    """
    if on_bad_sample not in ("raise", "skip"):
        raise ValueError(f'on_bad_sample must be "raise" or "skip", not {on_bad_sample!r}')
    path = Path(path)
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
        _raise_first(path, problems, missing)
    usable = [file for file in files if os.path.isfile(file.path)] if missing else files
    if not usable:
        raise ValueError(f"{path} holds no usable picture: {'; '.join((problems + missing)[:_NAMED_IN_MESSAGE])}")
    labels, names = _class_labels(usable, path) if kind == "label" else _attribute_labels(usable)
    report = {
        "file": str(path),
        "records": len(records),
        "used": len(usable),
        "left_out": {"bad record": problems, "image missing": missing},
        "label_counts": _label_counts(labels, names),
    }
    paths = [file.path for file in usable]
    return LabelledImageDataset(
        paths, labels, names, PixelLoader(image_processor, cache_bytes), report, [file.record for file in usable]
    )


def format_report(report: dict[str, Any]) -> str:
    """The report of a dataset in a few lines for the log; every record left out is named."""
    counts = report["label_counts"]
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:_NAMED_IN_MESSAGE])
    others = f" and {len(counts) - _NAMED_IN_MESSAGE} more" if len(counts) > _NAMED_IN_MESSAGE else ""
    lines = [f"{report['file']}: {report['records']} records, {report['used']} used; {shown}{others}"]
    for reason, messages in report["left_out"].items():
        if messages:
            lines.append(f"left out, {reason}: {len(messages)}")
            lines += [f"  {message}" for message in messages]
    return "\n".join(lines)


def _label_key(first: dict[str, Any], path: Path) -> str:
    keys = [key for key in ("label", "labels") if key in first]
    if len(keys) != 1 or (keys == ["labels"] and not (isinstance(first["labels"], dict) and first["labels"])):
        name = record_name(path, 0, first)
        raise ValueError(f'{path}: {name} needs either "label" (one class) or "labels" (an object of attributes)')
    return keys[0]


def _check_record(record: dict[str, Any], name: str, path: Path, kind: str, attributes: list[str]) -> _LabelledFile:
    file_name = record.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise ValueError(f'{name}: "file_name" must be a path, not {file_name!r}')
    root = os.path.abspath(path.parent)
    image = os.path.normpath(os.path.join(root, file_name))
    if os.path.commonpath([root, image]) != root:
        raise ValueError(f"{name}: {file_name!r} lies outside {root}; move it there")
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


def _class_labels(files: list[_LabelledFile], path: Path) -> tuple[torch.Tensor, list[str]]:
    """Numbers are kept as they are (classes 0 to the largest); names are numbered in alphabetical order."""
    kinds = {type(file.label) for file in files}
    if len(kinds) > 1:
        other = next(file.record for file in files if type(file.label) is not type(files[0].label))
        raise ValueError(f'{path}: "label" is a name in some records and a number in others, first {other}; use one')
    if kinds == {int}:
        names = [str(number) for number in range(max(file.label for file in files) + 1)]
        return torch.tensor([file.label for file in files]), names
    names = sorted({file.label for file in files})
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers[file.label] for file in files]), names


def _attribute_labels(files: list[_LabelledFile]) -> tuple[torch.Tensor, list[str]]:
    names = list(files[0].label)
    rows = [[UNKNOWN if file.label[name] is None else float(file.label[name]) for name in names] for file in files]
    return torch.tensor(rows), names


def _label_counts(labels: torch.Tensor, names: list[str]) -> dict[str, int]:
    """How many pictures have each label."""
    held = torch.bincount(labels, minlength=len(names)) if labels.ndim == 1 else (labels == 1).sum(0)
    return dict(zip(names, held.tolist(), strict=True))


def _raise_first(path: Path, problems: list[str], missing: list[str]) -> None:
    remedy = 'or leave such records out with on_bad_sample: "skip"'
    if problems:
        others = f"; {len(problems) - 1} more bad record(s)" if len(problems) > 1 else ""
        raise ValueError(f"{path}: {problems[0]}{others}; mend the data {remedy}")
    if missing:
        shown = "; ".join(missing[:_NAMED_IN_MESSAGE])
        others = f"; and {len(missing) - _NAMED_IN_MESSAGE} more" if len(missing) > _NAMED_IN_MESSAGE else ""
        raise FileNotFoundError(f"{path}: {len(missing)} image(s) do not exist: {shown}{others}; restore them {remedy}")
