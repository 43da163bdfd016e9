"""easy-VQA: coloured shapes on plain ground, 13 possible answers, the embedded default benchmark.

Data and split: https://github.com/vzhou842/easy-VQA (PyPI package `easy-vqa`, MIT). Its official test split holds 1,000
images and 9,673 questions. The scoring rule is the accuracy of its authors' Keras baseline
(https://github.com/vzhou842/easy-VQA-keras): the answer given must be the answer.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from eval.benchmarks.official import bare_prompt, import_by_position, one_right_answer
from eval.files import read_json
from eval.layouts import Layout
from eval.measures import mean_of
from eval.registry import Baseline, Benchmark
from eval.samples import BenchmarkData, Sample

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ANSWER_TYPE = {"yes": "yes/no", "no": "yes/no"} | dict.fromkeys(COLOURS, "colour") | dict.fromkeys(SHAPES, "shape")


def folder_of_package() -> Path | None:
    """The data of the package easy-vqa; None where it is not installed."""
    package = importlib.util.find_spec("easy_vqa")
    return None if package is None or package.origin is None else Path(package.origin).parent / "data"


def load(folder: Path) -> BenchmarkData:
    """Read questions.json, a list of [question, answer, image number]; sample ids are the position in that list.

    Raises:
        ValueError: malformed JSON or record; the message names file and record.
    """
    root = folder / "test"
    path = root / "questions.json"
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of [question, answer, image number]")
    return BenchmarkData(root, tuple(_read_record(record, index, path) for index, record in enumerate(records)))


def _read_record(record: object, index: int, path: Path) -> Sample:
    match record:
        case [str() as question, str() as answer, int() as image] if answer in ANSWER_TYPE:
            return Sample(
                id=f"test-{index:05d}",
                images=(f"images/{image}.png",),
                question=question,
                target=answer,
                cluster=str(image),
                categories={"answer_type": ANSWER_TYPE[answer]},
            )
    raise ValueError(f"{path}[{index}]: expected [question, one of the 13 answers, image number], found {record!r}")


def parse(text: str) -> str | None:
    """The answer without surrounding white space, or None if it is none of the 13 (counted as unparsed, and wrong)."""
    answer = text.strip()
    return answer if answer in ANSWER_TYPE else None


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """The sample's row: the answer as it is, and with letter case and one closing period forgiven."""
    return one_right_answer(parse(text), parse(text.strip().removesuffix(".").lower()), sample)


BENCHMARK = Benchmark(
    name="easy_vqa",
    split="test",
    version="1.0",
    reference="https://github.com/vzhou842/easy-VQA",
    data_needed="pip install easy-vqa==1.0, or --data-root DIR with DIR/easy_vqa/test/{questions.json,images/*.png}",
    n_expected=9673,
    fingerprint="14970cade512c7fd03c08a40882fb6ca41a919dae4d564af4d79dc834201f296",
    prompt_id="question_as_is",
    prompt=bare_prompt,
    max_new_tokens=16,
    parser="exact",
    judge=judge,
    metrics=(mean_of("accuracy", "score", primary=True), mean_of("accuracy_lenient", "score_lenient")),
    breakdowns=("answer_type",),
    layouts=(Layout(("test/questions.json",), load, ("test/images/*.png",)),),
    default_folder=folder_of_package,
    options=lambda _: tuple(ANSWER_TYPE),
    import_predictions=import_by_position,
    baselines=(
        Baseline(
            "question only, no image", 0.678, "most frequent test answer to each question: a blind model's ceiling"
        ),
        Baseline("Keras baseline, small", 0.938, "easy-VQA-keras, official data"),
        Baseline("Keras baseline, larger", 0.995, "easy-VQA demo model, twice the training data"),
    ),
)
