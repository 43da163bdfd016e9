"""What DocVQA and InfographicVQA share: the files of the Robust Reading Competition (RRC), ANLS, the submission.

Official scorer: the RRC's evaluator (https://rrc.cvc.uab.es/?ch=17), public as `eval_mm/infographicsvqa_eval.py` of
https://github.com/QwenLM/Qwen-VL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval.answer_files import Format
from eval.benchmarks.official import field, free_answer, read_records
from eval.layouts import Layout
from eval.measures import Metric, mean_of
from eval.metrics.text import anls, anls_lenient
from eval.samples import BenchmarkData, Prediction, Sample

SUBMISSION = Format("RRC submission", "questionId", "answer")
METRICS: tuple[Metric, ...] = (mean_of("anls", primary=True), mean_of("anls_lenient", "score_lenient"))
COMPARED = ("id", "question", "target", "answers")
"""Fields that the fingerprint covers: images lie elsewhere in each layout."""
MAX_NEW_TOKENS = 128
"""As LLaVA-1.5 generates: answers are spans of the document, which lmms-eval's 32 would cut."""


def rrc_layouts(
    files: Mapping[str, str],
    ending: str,
    *,
    image: str,
    document: Sequence[str] = (),
    types: Mapping[str, str] | None,
) -> tuple[Layout, ...]:
    """The layouts in which a split was ever published.

    Args:
        files: file of questions -> folder of its images, for each layout.
        ending: that of image files.
        image: field that holds the image's file, whose folder, if it names one, does not count.
        document: fields of which the first one that a question has names its cluster.
        types: category -> field with the question's labels, which only the files `..._withQT.json` have; None for a
            split without public answers.
    """

    def read(root: Path, name: str, folder: str) -> BenchmarkData:
        samples = []
        for where, row in read_records(root / name, "data"):
            file = Path(str(field(row, (image,), where))).name
            cluster = str(field(row, (*document, image), where))
            samples.append(rrc_sample(row, where, f"{folder}/{file}", cluster, types))
        return BenchmarkData(root, tuple(samples), compared=COMPARED)

    return tuple(
        Layout((name,), partial(read, name=name, folder=folder), (f"{folder}/*{ending}",))
        for name, folder in files.items()
    )


def rrc_sample(row: dict[str, Any], where: str, image: str, cluster: str, types: Mapping[str, str] | None) -> Sample:
    """A question; `types` as in `rrc_layouts`.

    Raises:
        ValueError: a malformed record, or one without answers where they are public; the message names `where`.
    """
    answers = () if types is None else _answers(row, where)
    return Sample(
        id=_identifier(row, where),
        images=(image,),
        question=field(row, ("question",), where),
        target=answers[0] if answers else "",
        cluster=cluster,
        categories={category: _labels(row, key, where) for category, key in (types or {}).items()},
        answers=answers,
    )


def _identifier(row: dict[str, Any], where: str) -> str:
    number = field(row, ("questionId",), where)
    if not isinstance(number, int):
        raise ValueError(f"{where}: 'questionId' must be a whole number, found {number!r}")
    return str(number)


def _answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    answers = field(row, ("answers",), where)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: 'answers' must be a list of at least one text, found {answers!r}")
    return tuple(answers)


def _labels(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    labels = row.get(key) or ()
    if isinstance(labels, str):
        raise ValueError(f"{where}: {key!r} must be a list of labels, found {labels!r}")
    return tuple(labels)


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """ANLS of the answer as it came, and of what it says."""
    return free_answer(text, score=anls(text, sample.answers), score_lenient=anls_lenient(text, sample.answers))


def write_submission(data: BenchmarkData, predictions: Mapping[str, Prediction]) -> str:
    """The server's list of {"questionId": number, "answer": text}: each question once, and no answer may be a list."""
    rows = [{"questionId": int(sample.id), "answer": predictions[sample.id].text.strip()} for sample in data.samples]
    return json.dumps(rows, ensure_ascii=False)
