"""Labelled pictures: attributes with unknowns, or one class; bad lines are refused or counted, and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from training.labelled_images import format_report, load_labelled_images


@pytest.fixture
def image_processor(processor):
    return processor.image_processor


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8), (number * 100, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "metadata.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def attributes(number: int, **labels: int | None) -> dict[str, Any]:
    return {"file_name": f"{number}.png", "labels": labels}


def test_attributes_keep_unknown_apart_from_no(folder, image_processor):
    path = write(folder, attributes(0, red=1, blue=0), attributes(1, blue=None, red=0))
    dataset = load_labelled_images(path, image_processor)
    assert dataset.problem_type == "multi_label_classification"
    assert dataset.id2label == {0: "red", 1: "blue"}
    assert dataset.labels.tolist() == [[1, 0], [0, -1]]
    batch = dataset.batch([0, 1])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert torch.equal(batch["labels"], dataset.labels)
    expected = image_processor(images=[Image.open(folder / "1.png")], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(batch["pixel_values"][1], expected)
    assert dataset.report["label_counts"] == {"red": 1, "blue": 0}


@pytest.mark.parametrize(
    ("values", "names", "numbers"),
    [(["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]), ([2, 0, 2], ["0", "1", "2"], [2, 0, 2])],
)
def test_one_class_a_picture(folder, image_processor, values, names, numbers):
    records = [{"file_name": f"{number}.png", "label": value} for number, value in enumerate(values)]
    dataset = load_labelled_images(write(folder, *records), image_processor)
    assert dataset.problem_type == "single_label_classification"
    assert dataset.label_names == names
    assert dataset.labels.tolist() == numbers
    assert dataset[2]["labels"].dtype == torch.long
    assert dataset[2]["labels"].shape == ()


@pytest.mark.parametrize(
    "bad",
    [
        {"labels": {"red": 1}},
        {"file_name": "../1.png", "labels": {"red": 1}},
        {"file_name": "9.png", "labels": {"red": 1}},
        {"file_name": "1.png", "label": 1},
        {"file_name": "1.png", "labels": {"green": 1}},
        {"file_name": "1.png", "labels": {"red": 2}},
        {"file_name": "1.png", "labels": {"red": "yes"}},
    ],
)
def test_bad_records_are_refused_or_counted(folder, image_processor, bad):
    path = write(folder, attributes(0, red=1), bad)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_labelled_images(path, image_processor)
    assert str(path) in str(raised.value)
    assert "metadata.jsonl[1]" in str(raised.value)
    dataset = load_labelled_images(path, image_processor, on_bad_sample="skip")
    assert len(dataset) == 1
    assert sum(len(named) for named in dataset.report["left_out"].values()) == 1
    assert "metadata.jsonl[1]" in format_report(dataset.report)


@pytest.mark.parametrize(
    ("records", "named"),
    [
        ([{"file_name": "0.png"}], "needs either"),
        ([{"file_name": "0.png", "labels": []}], "needs either"),
        ([{"file_name": "0.png", "label": True}], "must be a name or a number"),
        ([{"file_name": "0.png", "label": -1}], "must be a name or a number"),
        ([{"file_name": "0.png", "label": 1}, {"file_name": "1.png", "label": "a"}], "use one"),
    ],
)
def test_files_that_make_no_sense(folder, image_processor, records, named):
    with pytest.raises(ValueError, match=named):
        load_labelled_images(write(folder, *records), image_processor)


def test_a_corrupt_picture_is_named_when_it_is_opened(folder, image_processor):
    (folder / "0.png").write_bytes(b"broken")
    dataset = load_labelled_images(write(folder, attributes(0, red=1)), image_processor)
    with pytest.raises(ValueError, match=r"0\.png"):
        dataset[0]
