"""GQA, testdev_balanced: compositional questions made from scene graphs.

Official scorer: `eval.py` of https://cs.stanford.edu/people/dorarad/gqa/evaluate.html on answers that LLaVA's
`convert_gqa_for_eval.py` prepares (closing periods off, lower case). Its consistency, validity and plausibility need
files that testdev does not have, and are not computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.benchmarks.official import by_question_id, field, find_folder, short_prompt
from eval.files import read_json
from eval.hub import HubSource
from eval.measures import mean_of
from eval.metrics.text import gqa_accuracy, gqa_accuracy_lenient
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample

_FILE = "testdev_balanced_questions.json"


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read the questions. FileNotFoundError if the file is missing; ValueError names a malformed record."""
    root = find_folder("gqa", data_root, [_FILE], BENCHMARK.data_needed)
    questions = read_json(root / _FILE)
    if not isinstance(questions, dict):
        raise ValueError(f"{root / _FILE}: expected an object of questions")
    return BenchmarkData(
        root, tuple(_read(key, row, f"{root / _FILE}, question {key}") for key, row in questions.items())
    )


def _read(key: str, row: dict[str, Any], where: str) -> Sample:
    image = field(row, ("imageId",), where)
    structure = field(field(row, ("types",), where), ("structural",), where)
    return Sample(
        id=key,
        images=(f"images/{image}.jpg",),
        question=field(row, ("question",), where),
        target=field(row, ("answer",), where),
        cluster=image,
        categories={"kind": "open" if structure == "query" else "binary", "structural": structure},
    )


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """Official and forgiving equality; only an empty answer is unparsed, for any word may be an answer."""
    answer = text.strip() or None
    return {
        "parsed": answer,
        "parsed_lenient": answer,
        "score": gqa_accuracy(text, sample.target),
        "score_lenient": gqa_accuracy_lenient(text, sample.target),
    }


BENCHMARK = Benchmark(
    name="gqa",
    split="testdev_balanced",
    version="1.2",
    reference="https://cs.stanford.edu/people/dorarad/gqa/evaluate.html",
    data_needed=f"--data-root DIR with DIR/gqa/{{{_FILE},images/*.jpg}}: "
    "https://cs.stanford.edu/people/dorarad/gqa/download.html",
    load=load,
    n_expected=12578,
    fingerprint=None,
    prompt_id="llava15_short",
    prompt=short_prompt,
    max_new_tokens=16,
    parser="official (eval.py after convert_gqa_for_eval.py)",
    judge=judge,
    metrics=(mean_of("accuracy", primary=True), mean_of("accuracy_lenient", "score_lenient")),
    breakdowns=("kind", "structural"),
    import_predictions=by_question_id,
    hub=(
        HubSource(
            repositories=("lmms-lab/GQA", "lmms-lab-encoder/GQA"),
            splits=(("testdev_balanced_instructions", "testdev"),),
            sample=lambda row, number, where: _read(str(field(row, ("id",), where)), row, where),
            image_split=("testdev_balanced_images", "testdev"),
        ),
    ),
)
