"""VizWiz-VQA: questions that blind people asked about their photographs. `vizwiz` is val; `vizwiz_test` the test
server's.

Official scorer: the VizWiz API (https://vizwiz.org/tasks-and-datasets/vqa), which normalises the prediction but not the
answers. Not computed: its average precision of answerability, for which a model would have to give a confidence.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks.official import SHORT_SUFFIX, collect, field, find_folder
from eval.benchmarks.soft_accuracy import METRICS, most_frequent, soft_judge, unscored_judge
from eval.files import read_json
from eval.hub import HubSource, records
from eval.metrics.vqa import normalize_vqa
from eval.registry import Benchmark, Submission
from eval.samples import BenchmarkData, Prediction, Sample

_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read Annotations/val.json. FileNotFoundError if it is missing; ValueError names a malformed record."""
    return _load(find_folder("vizwiz", data_root, ["Annotations/val.json"], BENCHMARK.data_needed), "val")


def load_test(data_root: Path | None = None) -> BenchmarkData:
    """Read Annotations/test.json, which holds no answers; errors as `load`."""
    return _load(find_folder("vizwiz", data_root, ["Annotations/test.json"], BENCHMARK_TEST.data_needed), "test")


def _load(root: Path, split: str) -> BenchmarkData:
    path = root / "Annotations" / f"{split}.json"
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list")
    return BenchmarkData(root, tuple(_read(row, split, f"{path}, record {at}") for at, row in enumerate(rows, 1)))


def _read(row: dict[str, Any], split: str, where: str) -> Sample:
    image = field(row, ("image",), where)
    given = field(row, ("answers",), where) if split == "val" else []
    answers = tuple(str(field(answer, ("answer",), where)) for answer in given)
    return Sample(
        id=image,
        images=(f"{split}/{image}",),
        question=field(row, ("question",), where),
        target=most_frequent(answers),
        cluster=image,
        categories={"answer_type": str(row.get("answer_type", ""))},
        answers=answers,
    )


def _from_hub(row: dict[str, Any], split: str, where: str) -> Sample:
    answers = [answer if isinstance(answer, dict) else {"answer": answer} for answer in records(row.get("answers"))]
    name = str(field(row, ("question_id",), where)).removesuffix(".jpg")
    known = {"image": f"{name}.jpg", "answers": answers, "answer_type": row.get("category") or ""}
    return _read(row | known, split, where)


def _hub(split: str) -> tuple[HubSource]:
    source = HubSource(
        repositories=("lmms-lab/VizWiz-VQA", "lmms-lab-encoder/VizWiz-VQA"),
        splits=((None, split),),
        sample=lambda row, number, where: _from_hub(row, split, where),
    )
    return (source,)


def prompt(sample: Sample) -> str:
    """LLaVA-1.5's prompt; the question keeps its letter case."""
    return sample.question + _UNANSWERABLE + SHORT_SUFFIX


def import_predictions(path: Path, data: BenchmarkData) -> dict[str, Prediction]:
    """Rows of a submission (`image`, `answer`) or of LLaVA's answers (`question_id` = image, `text`)."""

    def find_id(row: dict[str, Any], where: str) -> str:
        return Path(str(field(row, ("image", "question_id"), where))).name

    return collect(path, data, find_id)


def write_submission(data: BenchmarkData, predictions: Mapping[str, Prediction]) -> str:
    """The server's list of {"image", "answer"}; answers are normalised as VQAv2's script does.

    LLaVA's `convert_vizwiz_for_submission.py` takes TextVQA's processor: of its 8,000 answers 28 differ, possessives.
    """
    rows = [{"image": sample.id, "answer": normalize_vqa(predictions[sample.id].text)} for sample in data.samples]
    return json.dumps(rows, ensure_ascii=False)


BENCHMARK = Benchmark(
    name="vizwiz",
    split="val",
    version="2020",
    reference="https://vizwiz.org/tasks-and-datasets/vqa",
    data_needed="--data-root DIR with DIR/vizwiz/{Annotations/val.json,val/VizWiz_val_*.jpg}",
    load=load,
    n_expected=4319,
    fingerprint=None,
    prompt_id="llava15_vizwiz",
    prompt=prompt,
    max_new_tokens=16,
    parser="official (VizWiz API)",
    judge=soft_judge("vizwiz"),
    metrics=METRICS,
    breakdowns=("answer_type",),
    import_predictions=import_predictions,
    hub=_hub("val"),
)

BENCHMARK_TEST = dataclasses.replace(
    BENCHMARK,
    name="vizwiz_test",
    shares_folder="vizwiz",
    split="test",
    data_needed="--data-root DIR with DIR/vizwiz/{Annotations/test.json,test/VizWiz_test_*.jpg}",
    load=load_test,
    n_expected=8000,
    judge=unscored_judge,
    metrics=(),
    breakdowns=(),
    hub=_hub("test"),
    submission=Submission("vizwiz_test_submission.json", write_submission),
)
