"""Pictures with texts: both forms of data, the names of their fields, and what is said about bad records."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from training.captioned_images import CaptionColumns, format_report, load_captioned_images

TEXTS = ["a red square", "zwei blaue Kreise", "x"]


@pytest.fixture
def image_processor(processor):
    return processor.image_processor


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (number * 100, 0, 0))


def write(folder: Path, records: list[dict[str, Any]], name: str = "metadata.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(image: str = "file_name", text: str = "text") -> list[dict[str, Any]]:
    return [{image: f"{number}.png", text: line} for number, line in enumerate(TEXTS)]


def write_parquet(folder: Path, texts: list[Any], image: str = "image", text: str = "text") -> Path:
    buffers = [io.BytesIO() for _ in texts]
    for number, buffer in enumerate(buffers):
        picture(number).save(buffer, "PNG")
    cells = [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]
    path = folder / "pairs.parquet"
    datasets.Dataset.from_dict({image: cells, text: texts}).to_parquet(path)
    return path


def check(dataset, image_processor, expected: list[int]) -> None:
    assert [dataset.texts[index] for index in range(len(dataset))] == [TEXTS[number] for number in expected]
    pixels = image_processor(images=[picture(number) for number in expected], return_tensors="pt")["pixel_values"]
    assert torch.equal(dataset.pixel_values(range(len(dataset))), pixels)


@pytest.mark.parametrize(("image", "text"), [("file_name", "text"), ("image", "caption")])
def test_metadata_is_read_under_its_usual_names(folder, image_processor, image, text):
    write(folder, records(image, text))
    check(load_captioned_images(folder, image_processor), image_processor, [0, 1, 2])
    (folder / "list.json").write_text(json.dumps(records(image, text)))
    check(load_captioned_images(folder / "list.json", image_processor), image_processor, [0, 1, 2])


@pytest.mark.parametrize(("image", "text"), [("image", "text"), ("image", "caption")])
def test_parquet_is_read_under_its_usual_names(tmp_path, image_processor, image, text):
    path = write_parquet(tmp_path, TEXTS, image, text)
    check(load_captioned_images(path, image_processor), image_processor, [0, 1, 2])
    check(load_captioned_images(tmp_path, image_processor), image_processor, [0, 1, 2])


def test_other_names_are_given(folder, image_processor):
    columns = CaptionColumns("jpg", "txt")
    path = write(folder, records("jpg", "txt"))
    check(load_captioned_images(path, image_processor, columns=columns), image_processor, [0, 1, 2])
    path = write_parquet(folder, TEXTS, "jpg", "txt")
    check(load_captioned_images(path, image_processor, columns=columns), image_processor, [0, 1, 2])


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        ({"picture": "0.png", "text": "x"}, {}, r"has no 'image' or 'file_name' among picture, text.*--image_column"),
        ({"image": "0.png", "label": "x"}, {}, r"has no 'text' or 'caption' among image, label.*--text_column"),
        ({"image": "0.png", "text": "x", "caption": "y"}, {}, r"has both text and caption.*--text_column"),
        ({"image": "0.png", "text": "x"}, {"text": "alt"}, r"has no 'alt' among image, text"),
    ],
)
def test_unclear_fields_are_an_error_that_names_the_argument(folder, image_processor, record, columns, message):
    path = write(folder, [record])
    with pytest.raises(ValueError, match=message):
        load_captioned_images(path, image_processor, columns=CaptionColumns(**columns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, r'metadata\.jsonl: metadata\.jsonl\[1\]: "text" must be a text, not None'),
        ({"text": " \n"}, r'metadata\.jsonl\[1\]: "text" is empty'),
        ({"file_name": "../1.png"}, r"metadata\.jsonl\[1\]: '\.\./1\.png' lies outside"),
        ({"file_name": 7}, r'metadata\.jsonl\[1\]: "file_name" must be a path, not 7'),
        ({"file_name": "9.png"}, r"1 image\(s\) do not exist: metadata\.jsonl\[1\]: .*9\.png"),
    ],
)
def test_bad_record_is_named_or_left_out(folder, image_processor, change, message):
    lines = records()
    lines[1] |= change
    path = write(folder, lines)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_captioned_images(path, image_processor)
    dataset = load_captioned_images(path, image_processor, "skip")
    check(dataset, image_processor, [0, 2])
    assert dataset.pictures.name(1) == "metadata.jsonl[2]"
    report = format_report(dataset.report)
    assert "3 records, 2 used" in report
    assert report.count("metadata.jsonl[1]") == 1


@pytest.mark.parametrize(("text", "problem"), [(None, "must be a text, not None"), ("", "is empty")])
def test_bad_row_is_named_or_left_out(tmp_path, image_processor, text, problem):
    path = write_parquet(tmp_path, [TEXTS[0], text, TEXTS[2]])
    with pytest.raises(ValueError, match=rf"pairs\.parquet\[1\]: 'text' {problem}"):
        load_captioned_images(path, image_processor)
    dataset = load_captioned_images(path, image_processor, "skip")
    check(dataset, image_processor, [0, 2])
    assert dataset.pictures.name(1) == "pairs.parquet[2]"


def test_nothing_usable_is_an_error_even_when_skipping(folder, image_processor):
    path = write(folder, [{"file_name": "0.png", "text": ""}])
    with pytest.raises(ValueError, match=r"holds no usable pair: metadata\.jsonl\[0\]"):
        load_captioned_images(path, image_processor, "skip")


def test_corrupt_picture_is_named_when_it_is_read(folder, image_processor):
    path = write(folder, records())
    (folder / "1.png").write_bytes(b"not a picture")
    dataset = load_captioned_images(path, image_processor)
    with pytest.raises(ValueError, match=r"metadata\.jsonl: metadata\.jsonl\[1\]: image .*1\.png is not a picture"):
        dataset.pixels(1)
