"""A benchmark of twelve drawn images, and a tiny random model on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from defocus_mllm import DefocusForConditionalGeneration, DefocusProcessor
from eval.benchmarks.easy_vqa import BENCHMARK
from eval.registry import Benchmark

NUMBER_OF_IMAGES = 12
QUESTIONS = [
    ("is there a red shape?", "yes"),
    ("what shape is in the image?", "circle"),
    ("what is the color of the shape in the image?", "red"),
    ("is no blue shape present?", "no"),
    ("what color?", "blue"),
]


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A folder laid out like the official data, with 12 images and 60 questions."""
    folder = tmp_path / "data" / "easy_vqa" / "test"
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(NUMBER_OF_IMAGES):
        image = Image.new("RGB", (64, 64), (255, 20 * number, 200))
        ImageDraw.Draw(image).ellipse((number, number, 30 + number, 30 + number), fill=(20 * number, 0, 90))
        image.save(folder / "images" / f"{number}.png")
        records += [[question, answer, number] for question, answer in QUESTIONS]
    (folder / "questions.json").write_text(json.dumps(records))
    return tmp_path / "data"


@pytest.fixture
def benchmark(data_root: Path) -> Benchmark:
    """easy-VQA, made to expect the data of `data_root`."""
    data = BENCHMARK.load(data_root)
    return dataclasses.replace(BENCHMARK, n_expected=len(data.samples), fingerprint=data.fingerprint())


@pytest.fixture
def model_dir(model: DefocusForConditionalGeneration, processor: DefocusProcessor, tmp_path: Path) -> Path:
    """The tiny random model of tests/conftest.py, saved with its processor."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
