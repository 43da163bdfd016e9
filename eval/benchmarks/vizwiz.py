"""VizWiz-VQA: questions that blind people asked about their photographs. `vizwiz` is val; `vizwiz_test` the test
server's.

Official scorer: the VizWiz API (https://vizwiz.org/tasks-and-datasets/vqa), which normalises the prediction but not the
answers. Its second task, whether a question can be answered at all, is scored from the answers, as where no confidence
is given: "unanswerable" after normalisation says no (`evaluate_unanswerability` of
https://github.com/TRI-ML/vlm-evaluation).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from eval.answer_files import LLAVA, AnswerFile, Format, Imported
from eval.benchmarks.official import SHORT_SUFFIX, check_question, collect, field, read_records, unscored_judge
from eval.benchmarks.soft_accuracy import METRICS, most_frequent, soft_judge
from eval.hub import HubSource, records
from eval.layouts import Layout
from eval.measures import Metric
from eval.metrics.answerability import average_precision, unanswerable_counts
from eval.metrics.vqa import normalize_vqa
from eval.metrics.yes_no import pope_f1
from eval.registry import Benchmark, Submission
from eval.samples import BenchmarkData, Prediction, Sample

_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def load(root: Path, split: str) -> BenchmarkData:
    """Read Annotations/SPLIT.json, of which test holds no answers; ValueError names a malformed record."""
    records = read_records(root / "Annotations" / f"{split}.json")
    return BenchmarkData(root, tuple(_read(row, split, where) for where, row in records))


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
        details={"answerable": row["answerable"]} if "answerable" in row else {},
    )


def _from_hub(row: dict[str, Any], split: str, where: str) -> Sample:
    answers = [answer if isinstance(answer, dict) else {"answer": answer} for answer in records(row.get("answers"))]
    name = str(field(row, ("question_id",), where)).removesuffix(".jpg")
    known = {"image": f"{name}.jpg", "answers": answers, "answer_type": row.get("category") or ""}
    return _read(row | known, split, where)


def _layout(split: str) -> Layout:
    read = partial(load, split=split)
    return Layout((f"Annotations/{split}.json",), read, (f"{split}/VizWiz_{split}_*.jpg",))


def _hub(split: str) -> HubSource:
    return HubSource(
        repositories=("lmms-lab/VizWiz-VQA", "lmms-lab-encoder/VizWiz-VQA"),
        splits=((None, split),),
        sample=lambda row, number, where: _from_hub(row, split, where),
    )


def prompt(sample: Sample) -> str:
    """LLaVA-1.5's prompt; the question keeps its letter case."""
    return sample.question + _UNANSWERABLE + SHORT_SUFFIX


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """Soft accuracy and, where the data say it, what was and what should have been said of answerability."""
    row = soft_judge("vizwiz")(text, sample)
    if "answerable" in sample.details:
        row["unanswerable"] = not sample.details["answerable"]
        row["said_unanswerable"] = normalize_vqa(text) == "unanswerable"
    return row


def import_predictions(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """Rows of a submission, whose `image` may have a folder in front, or of LLaVA's answers.

    Their `question_id` is the image too or, as in LLaVA's question file, its number; then the prompt must ask the
    question.
    """
    samples = {sample.id: sample for sample in data.samples}
    numbers = {int(found[1]): name for name in samples if (found := re.search(r"(\d+)\.\w+$", name))}

    def find_id(row: dict[str, Any], where: str) -> str:
        image = row.get("image", row.get("question_id"))
        name = numbers.get(image, str(image)) if isinstance(image, int) else Path(str(image)).name
        if isinstance(image, int) and name in samples:
            check_question(row.get("prompt"), samples[name], where)
        return name

    return collect(answers, data, (Format("VizWiz submission", "image", "answer"), LLAVA), find_id)


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
    n_expected=4319,
    fingerprint=None,
    prompt_id="llava15_vizwiz",
    prompt=prompt,
    max_new_tokens=16,
    parser="official (VizWiz API)",
    judge=judge,
    metrics=(
        *METRICS,
        Metric("unanswerable_average_precision", unanswerable_counts, average_precision, needs="unanswerable"),
        Metric("unanswerable_f1", unanswerable_counts, pope_f1, needs="unanswerable"),
    ),
    breakdowns=("answer_type",),
    import_predictions=import_predictions,
    layouts=(_layout("val"),),
    hub=(_hub("val"),),
)

BENCHMARK_TEST = dataclasses.replace(
    BENCHMARK,
    name="vizwiz_test",
    shares_folder="vizwiz",
    split="test",
    data_needed="--data-root DIR with DIR/vizwiz/{Annotations/test.json,test/VizWiz_test_*.jpg}",
    n_expected=8000,
    judge=unscored_judge,
    metrics=(),
    breakdowns=(),
    layouts=(_layout("test"),),
    hub=(_hub("test"),),
    submission=Submission("vizwiz_test_submission.json", write_submission),
)
