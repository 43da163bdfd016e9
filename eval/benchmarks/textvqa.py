"""TextVQA 0.5.1 val: reading text in images. `textvqa_ocr` has OCR tokens in the prompt, as LLaVA-1.5; `textvqa` has
not.

Official scorer: `llava/eval/m4c_evaluator.py` of https://github.com/haotian-liu/LLaVA (facebookresearch/mmf's). Never
compare the two: OCR tokens are worth more than ten points. Data: https://textvqa.org/dataset.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

from eval.answer_files import LLAVA, AnswerFile, Imported
from eval.benchmarks.official import SHORT_SUFFIX, collect, field, find_folder, read_records, short_prompt
from eval.benchmarks.soft_accuracy import METRICS, VQA_SUBMISSION, most_frequent, soft_judge
from eval.files import shown
from eval.hub import HubSource
from eval.layouts import Layout
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample

_FILE = "TextVQA_0.5.1_val.json"
_OCR_FILE = "TextVQA_Rosetta_OCR_v0.2_val.json"
_IMAGES = ("train_images/*.jpg",)


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read the questions. FileNotFoundError if the file is missing; ValueError names a malformed record."""
    return _load(find_folder("textvqa", data_root, [_FILE], BENCHMARK.data_needed), {})


def load_with_ocr(data_root: Path | None = None) -> BenchmarkData:
    """Read the questions and Rosetta's OCR tokens of their images; ValueError if an image has no entry."""
    root = find_folder("textvqa", data_root, [_FILE, _OCR_FILE], BENCHMARK_OCR.data_needed)
    tokens = {}
    for where, row in read_records(root / _OCR_FILE, "data"):
        tokens[str(field(row, ("image_id",), where))] = field(row, ("ocr_tokens",), where)
    data = _load(root, tokens)
    without = next((sample for sample in data.samples if "ocr_tokens" not in sample.details), None)
    if without is not None:
        raise ValueError(f"{root / _OCR_FILE}: no entry for image {without.cluster!r}")
    return data


def _load(root: Path, tokens: dict[str, list[str]]) -> BenchmarkData:
    records = read_records(root / _FILE, "data")
    return BenchmarkData(root, tuple(_read(row, tokens, where) for where, row in records))


def _read(row: dict[str, Any], tokens: dict[str, list[str]], where: str) -> Sample:
    image = str(field(row, ("image_id",), where))
    answers = tuple(field(row, ("answers",), where))
    if len(answers) != 10:
        raise ValueError(f"{where}: 'answers' must hold ten answers, found {len(answers)}")
    return Sample(
        id=str(field(row, ("question_id",), where)),
        images=(f"train_images/{image}.jpg",),
        question=field(row, ("question",), where),
        target=most_frequent(answers),
        cluster=image,
        answers=answers,
        details={"ocr_tokens": tokens[image]} if image in tokens else {},
    )


def _with_ocr_from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    return _read(row, {str(row.get("image_id")): field(row, ("ocr_tokens",), where)}, where)


_HUB = HubSource(
    repositories=("lmms-lab/textvqa", "lmms-lab-encoder/textvqa"),
    splits=((None, "validation"),),
    sample=lambda row, number, where: _read(row, {}, where),
)


def ocr_prompt(sample: Sample) -> str:
    """LLaVA-1.5's prompt: the tokens between the question and its suffix, the line also where there are none."""
    return f"{sample.question}\nReference OCR token: {', '.join(sample.details['ocr_tokens'])}{SHORT_SUFFIX}"


def import_predictions(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """LLaVA's rows, keyed by image (`question_id` holds it) and the question, the first line of `prompt`.

    A question asked twice about an image takes its answers in order. Rows whose `question_id` is official need no
    prompt.
    """
    known = {sample.id for sample in data.samples}
    asked: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for sample in data.samples:
        asked[sample.cluster, sample.question.strip().lower()].append(sample.id)

    def find_id(row: dict[str, Any], where: str) -> str:
        number = str(row["question_id"])
        if number in known:
            return number
        question = str(field(row, ("prompt",), where)).removeprefix("<image>\n").split("\n")[0].strip().lower()
        waiting = asked[number, question]
        if not waiting:
            raise ValueError(f"{where}: image {shown(number)} has no further question {shown(question)}")
        return waiting.pop(0)

    return collect(answers, data, (LLAVA, VQA_SUBMISSION), find_id)


BENCHMARK = Benchmark(
    name="textvqa",
    split="val",
    version="0.5.1",
    reference="https://textvqa.org/dataset",
    data_needed=f"--data-root DIR with DIR/textvqa/{{{_FILE},train_images/*.jpg}}",
    load=load,
    n_expected=5000,
    fingerprint=None,
    prompt_id="llava15_short",
    prompt=short_prompt,
    max_new_tokens=16,
    parser="official (m4c_evaluator.py)",
    judge=soft_judge("m4c"),
    metrics=METRICS,
    import_predictions=import_predictions,
    layouts=(Layout((_FILE,), _IMAGES),),
    hub=(_HUB,),
)

BENCHMARK_OCR = dataclasses.replace(
    BENCHMARK,
    name="textvqa_ocr",
    shares_folder="textvqa",
    data_needed=f"--data-root DIR with DIR/textvqa/{{{_FILE},{_OCR_FILE},train_images/*.jpg}}",
    load=load_with_ocr,
    prompt_id="llava15_short_ocr",
    prompt=ocr_prompt,
    layouts=(Layout((_FILE, _OCR_FILE), _IMAGES),),
    hub=(
        dataclasses.replace(
            _HUB, sample=_with_ocr_from_hub, differs="OCR tokens are its column `ocr_tokens`, not Rosetta's file"
        ),
    ),
)
