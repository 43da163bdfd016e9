"""LLaVA-Bench (in the wild; 60 questions) and MM-Vet (218): long answers, which only a judge such as GPT-4 can score.

Nothing is scored here, for a judge's marks can neither be repeated nor had offline: the answers are written in the form
that the official scripts take. LLaVA-Bench: `llava/eval/eval_gpt_review_bench.py` of
https://github.com/haotian-liu/LLaVA, which reads questions and answers line by line, in the same order, and needs an
`answer_id`; data: https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild. MM-Vet: `mm-vet_evaluator.py` of
https://github.com/yuweihao/MM-Vet, with mm-vet.zip.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.answer_files import LLAVA, AnswerFile, Format, Imported
from eval.benchmarks.official import bare_prompt, collect, field, importer, located, read_object, unscored_judge
from eval.files import json_line, read_json_lines, sha256_of_json
from eval.hub import HubSource
from eval.layouts import Layout
from eval.registry import Benchmark, Submission
from eval.samples import BenchmarkData, Prediction, Sample

_COMPARED = ("id", "question")
_COMPARED_MM_VET = ("id", "question", "target")
_MM_VET_PREFIX = "v1_"


def load(root: Path) -> BenchmarkData:
    """Read LLaVA-Bench's questions.jsonl; ValueError names a malformed record."""
    samples = []
    for where, row in located(read_json_lines(root / "questions.jsonl"), root / "questions.jsonl"):
        samples.append(_read(row, str(field(row, ("image",), where)), where))
    return BenchmarkData(root, tuple(samples), compared=_COMPARED)


def _read(row: dict[str, Any], image: str, where: str) -> Sample:
    return Sample(
        id=str(field(row, ("question_id",), where)),
        images=(f"images/{image}",),
        question=str(field(row, ("text", "question"), where)),
        target="",
        cluster=image,
        categories={"category": str(field(row, ("category",), where))},
    )


def _from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    image = Path(str(row.get("image_id") or f"row-{number}")).stem
    return _read(row, f"{image}.jpg", where)


def load_mm_vet(root: Path) -> BenchmarkData:
    """Read MM-Vet's mm-vet.json; ValueError names a malformed record."""
    samples = []
    for name, row in read_object(root / "mm-vet.json").items():
        where = f"{root / 'mm-vet.json'}, question {name}"
        labels = tuple(map(str, field(row, ("capability",), where)))
        samples.append(_read_mm_vet(row, name, str(field(row, ("imagename",), where)), labels, where))
    return BenchmarkData(root, tuple(samples), compared=_COMPARED_MM_VET)


def _read_mm_vet(row: dict[str, Any], name: str, image: str, labels: tuple[str, ...], where: str) -> Sample:
    return Sample(
        id=name,
        images=(f"images/{image}",),
        question=str(field(row, ("question",), where)),
        target=str(field(row, ("answer",), where)),
        cluster=image,
        categories={"capability": labels[0] if len(labels) == 1 else labels},
    )


def _mm_vet_from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    name, labels = str(field(row, ("question_id",), where)), field(row, ("capability",), where)
    labels = labels.split(",") if isinstance(labels, str) else labels
    return _read_mm_vet(row, name, f"{name}.png", tuple(label.strip() for label in labels), where)


def import_mm_vet(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """The official results (id -> answer), or LLaVA's rows, whose `question_id` is the number in the id."""
    if LLAVA.id_field in answers.rows[0].values:
        return collect(answers, data, find_id=lambda row, _: f"{_MM_VET_PREFIX}{row['question_id']}")
    results = Format("MM-Vet results", "id", "answer")
    return collect(answers.entries(results.id_field, results.text_field), data, (results,))


def write_answers(data: BenchmarkData, predictions: Mapping[str, Prediction]) -> str:
    """LLaVA's answer file, in the order of the questions."""

    def row(sample: Sample) -> dict[str, Any]:
        text = predictions[sample.id].text
        number = int(sample.id) if sample.id.isdecimal() else sample.id
        answer_id = sha256_of_json([sample.id, text])[:22]
        return {
            "question_id": number,
            "prompt": bare_prompt(sample),
            "text": text,
            "answer_id": answer_id,
            "metadata": {},
        }

    return "".join(json_line(row(sample)) for sample in data.samples)


def write_mm_vet(data: BenchmarkData, predictions: Mapping[str, Prediction]) -> str:
    """MM-Vet's result file: id -> answer."""
    answers = {sample.id: predictions[sample.id].text for sample in data.samples}
    return json.dumps(answers, indent=2, ensure_ascii=False)


BENCHMARK = Benchmark(
    name="llava_bench",
    split="in_the_wild",
    version="1",
    reference="https://github.com/haotian-liu/LLaVA (llava/eval/eval_gpt_review_bench.py)",
    data_needed="--data-root DIR with DIR/llava_bench/{questions.jsonl,images/*.jpg}: "
    "huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
    n_expected=60,
    fingerprint="c17de87456d18186cf8d5010543c5ff874c22d0a721c2a6bbf4a1083339a0dab",
    prompt_id="question_as_is",
    prompt=bare_prompt,
    max_new_tokens=1024,
    parser="none",
    judge=unscored_judge,
    metrics=(),
    import_predictions=importer(LLAVA),
    layouts=(Layout(("questions.jsonl",), load, ("images/*.jpg",)),),
    hub=(
        HubSource(
            repositories=("lmms-lab/llava-bench-in-the-wild", "lmms-lab-encoder/llava-bench-in-the-wild"),
            splits=((None, "train"),),
            sample=_from_hub,
            compared=_COMPARED,
        ),
    ),
    submission=Submission("llava_bench_answers.jsonl", write_answers, needs="judge required (GPT-4)"),
)

BENCHMARK_MM_VET = Benchmark(
    name="mm_vet",
    split="test",
    version="1",
    reference="https://github.com/yuweihao/MM-Vet",
    data_needed="--data-root DIR with DIR/mm_vet/{mm-vet.json,images/v1_*}: mm-vet.zip among the releases of "
    "github.com/yuweihao/MM-Vet",
    n_expected=218,
    fingerprint=None,
    prompt_id="question_as_is",
    prompt=bare_prompt,
    max_new_tokens=1024,
    parser="none",
    judge=unscored_judge,
    metrics=(),
    import_predictions=import_mm_vet,
    layouts=(Layout(("mm-vet.json",), load_mm_vet, ("images/v1_*",)),),
    hub=(
        HubSource(
            repositories=("lmms-lab/MMVet", "lmms-lab-encoder/MMVet"),
            splits=((None, "test"),),
            sample=_mm_vet_from_hub,
            differs="it does not say which questions share an image",
            compared=_COMPARED_MM_VET,
        ),
    ),
    submission=Submission("mm_vet_results.json", write_mm_vet, needs="judge required (GPT-4)"),
)
