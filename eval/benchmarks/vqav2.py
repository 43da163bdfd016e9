"""VQAv2: open questions about COCO images, ten answers each. `vqav2` is val2014; `vqav2_test_dev` goes to the test
server.

Official scorer: `PythonEvaluationTools/vqaEvaluation/vqaEval.py` of https://github.com/GT-Vision-Lab/VQA. Published
LLaVA-1.5 numbers are of test-dev: do not compare them with val. The submission holds normalised answers, because
against ten equal answers the official script compares letter for letter. They are normalised as that script does;
LLaVA's `convert_vqav2_for_submission.py` takes TextVQA's processor, whose "dog 's" never equals a "dog's".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from eval.answer_files import LLAVA, AnswerFile, Imported
from eval.benchmarks.official import collect, importer, read_records, short_prompt, unscored_judge
from eval.benchmarks.soft_accuracy import METRICS, VQA_SUBMISSION, soft_judge, vqa_layout, vqa_sample
from eval.hub import HubSource, records
from eval.hub_folders import find_table
from eval.metrics.vqa import normalize_vqa
from eval.registry import Benchmark, Submission
from eval.samples import BenchmarkData, Prediction, Sample

_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
_IMAGE = "val2014/COCO_val2014_{:012d}.jpg"
_TEST_DEV = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
_TEST = "v2_OpenEnded_mscoco_test2015_questions.json"
_TEST_IMAGE = "test2015/COCO_test2015_{:012d}.jpg"


def _from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    return vqa_sample(row, row | {"answers": records(row.get("answers"))}, _IMAGE, where)


def _test_from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    return vqa_sample(row, {}, _TEST_IMAGE, where)


_HUB = HubSource(
    repositories=("lmms-lab/VQAv2", "lmms-lab-encoder/VQAv2"),
    splits=((None, "validation"),),
    sample=_from_hub,
)


def import_test_dev(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """Answers to test-dev, or a submission with all of test2015, whose other questions are left out."""
    asked = {sample.id for sample in data.samples}
    others = {str(row.get("question_id")) for row in _all_test_questions(data)} - asked

    def leave_out(row: dict[str, Any]) -> str | None:
        return "of test2015 outside test-dev" if str(row["question_id"]) in others else None

    return collect(answers, data, (LLAVA, VQA_SUBMISSION), leave_out=leave_out)


def write_submission(data: BenchmarkData, predictions: Mapping[str, Prediction]) -> str:
    """The server wants all of test2015: questions outside test-dev get the empty answer, as in LLaVA's script."""
    rows = []
    for question in _all_test_questions(data):
        prediction = predictions.get(str(question["question_id"]))
        answer = normalize_vqa(prediction.text) if prediction else ""
        rows.append({"question_id": question["question_id"], "answer": answer})
    return json.dumps(rows, ensure_ascii=False)


def _all_test_questions(data: BenchmarkData) -> Iterable[dict[str, Any]]:
    if data.origin is None:
        return [row for _, row in read_records(data.root / _TEST, "questions")]
    table = find_table(data.root, None, "test")
    if table is None:
        raise FileNotFoundError(f"{data.root}: the split test is not there any more: the submission needs its numbers")
    return table[0].rows()


BENCHMARK = Benchmark(
    name="vqav2",
    split="val2014",
    version="2.0",
    reference="https://github.com/GT-Vision-Lab/VQA",
    data_needed=f"--data-root DIR with DIR/vqav2/{{{_QUESTIONS},{_ANNOTATIONS},val2014/COCO_val2014_*.jpg}}: "
    "https://visualqa.org/download.html",
    n_expected=214354,
    fingerprint=None,
    prompt_id="llava15_short",
    prompt=short_prompt,
    max_new_tokens=16,
    parser="official (vqaEval.py)",
    judge=soft_judge("official"),
    metrics=METRICS,
    breakdowns=("answer_type", "question_type"),
    import_predictions=importer(LLAVA, VQA_SUBMISSION),
    layouts=(vqa_layout(_QUESTIONS, _ANNOTATIONS, _IMAGE),),
    hub=(_HUB,),
)

BENCHMARK_TEST_DEV = dataclasses.replace(
    BENCHMARK,
    name="vqav2_test_dev",
    shares_folder="vqav2",
    split="test-dev2015",
    data_needed=f"--data-root DIR with DIR/vqav2/{{{_TEST_DEV},{_TEST},test2015/COCO_test2015_*.jpg}}: "
    "https://visualqa.org/download.html",
    n_expected=107394,
    judge=unscored_judge,
    metrics=(),
    breakdowns=(),
    import_predictions=import_test_dev,
    layouts=(vqa_layout(_TEST_DEV, None, _TEST_IMAGE, also_needed=(_TEST,)),),
    hub=(dataclasses.replace(_HUB, splits=((None, "testdev"),), sample=_test_from_hub, also_needed=((None, "test"),)),),
    submission=Submission("vqav2_test_dev_submission.json", write_submission),
)
