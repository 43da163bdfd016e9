"""What the benchmarks of VQA soft accuracy share: the files of the VQA challenge, and the row of a sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from eval.answer_files import Format
from eval.benchmarks.official import field, read_records
from eval.layouts import Layout
from eval.measures import Metric, mean_of
from eval.metrics.vqa import Mode, normalize_vqa, vqa_soft_accuracy
from eval.samples import BenchmarkData, Sample

_KINDS = ("answer_type", "question_type")
VQA_SUBMISSION = Format("VQA submission", "question_id", "answer")
METRICS: tuple[Metric, ...] = (mean_of("vqa_accuracy", primary=True), mean_of("vqa_accuracy_lenient", "score_lenient"))


def soft_judge(official: Mode) -> Callable[[str, Sample], dict[str, Any]]:
    """Rows of soft accuracy: the official mode, and the best that normalising both sides gives to the answer's first
    line.

    An answer that is empty after normalisation is unparsed; nothing else can be, for any text may be an answer.
    """

    def judge(text: str, sample: Sample) -> dict[str, Any]:
        text = text.strip()
        line = text.split("\n")[0].strip()
        score = vqa_soft_accuracy(text, sample.answers, official)
        return {
            "parsed": text or None,
            "parsed_lenient": normalize_vqa(line) or None,
            "score": score,
            "score_lenient": max(score, vqa_soft_accuracy(line, sample.answers, "normalized")),
        }

    return judge


def vqa_layout(questions: str, annotations: str | None, image: str, *, also_needed: tuple[str, ...] = ()) -> Layout:
    """Files of the VQA challenge: questions, annotations unless they are secret, and images.

    Args:
        image: format of an image's file, with its number to be put in.
        also_needed: files that the submission needs.
    """
    files = (questions, *([annotations] if annotations else []), *also_needed)
    read = partial(_read_vqa, questions=questions, annotations=annotations, image=image)
    return Layout(files, read, (re.sub(r"\{.*\}", "*", image),))


def _read_vqa(root: Path, questions: str, annotations: str | None, image: str) -> BenchmarkData:
    """Join questions and annotations; ValueError if they are not about the same questions."""
    asked = read_records(root / questions, "questions")
    truth: dict[str, dict[str, Any]] = {}
    if annotations is not None:
        records = read_records(root / annotations, "annotations")
        truth = {str(field(row, ("question_id",), where)): row for where, row in records}
        if set(truth) != {str(row.get("question_id")) for _, row in asked}:
            raise ValueError(f"{root / annotations}: other questions than in {questions}")
    samples = []
    for where, row in asked:
        known = truth.get(str(row.get("question_id")), {})
        samples.append(vqa_sample(row, known, image, where))
    return BenchmarkData(root, tuple(samples))


def vqa_sample(question: Mapping[str, Any], annotation: Mapping[str, Any], image: str, where: str) -> Sample:
    """A question with its annotation, {} where answers are secret; ValueError names `where` and the missing field."""
    picture = field(question, ("image_id",), where)
    answers = tuple(str(field(answer, ("answer",), where)) for answer in annotation.get("answers", ()))
    return Sample(
        id=str(field(question, ("question_id",), where)),
        images=(image.format(picture),),
        question=field(question, ("question",), where),
        target=annotation.get("multiple_choice_answer") or most_frequent(answers),
        cluster=str(picture),
        categories={name: str(annotation.get(name, "")) for name in _KINDS if "answer_type" in annotation},
        answers=answers,
    )


def most_frequent(answers: tuple[str, ...]) -> str:
    """The answer given most often, the first of them in a tie; "" if there is none."""
    return max(answers, key=answers.count, default="")
