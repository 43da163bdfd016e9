"""GQA, testdev_balanced: compositional questions made from scene graphs.

Official scorer: `eval.py` of https://cs.stanford.edu/people/dorarad/gqa/evaluate.html on answers that LLaVA's
`convert_gqa_for_eval.py` prepares (closing periods off, lower case). Of its other scores the distribution is always
computed; validity and plausibility where its file of choices lies beside the questions, and consistency where all
entailed questions are among the questions: testdev comes with neither. Grounding needs maps of attention.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from eval.answer_files import LLAVA, Format
from eval.benchmarks.official import field, free_answer, importer, read_object, short_prompt
from eval.hub import HubSource, records
from eval.layouts import Layout
from eval.measures import Metric, Style, mean_of
from eval.metrics.gqa import (
    consistency,
    consistency_sums,
    distribution,
    distribution_counts,
    gqa_accuracy,
    gqa_accuracy_lenient,
    is_among,
    number_of_steps,
)
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample

_CHOICES = "testdev_balanced_choices.json"
_FILE = "testdev_balanced_questions.json"


def load(root: Path) -> BenchmarkData:
    """Read the questions, and the choices where they are; ValueError names a malformed record."""
    questions = read_object(root / _FILE)
    choices = read_object(root / _CHOICES) if (root / _CHOICES).is_file() else None
    entails = any(set(row.get("entailed", ())) - {key} for key, row in questions.items())
    entailing = entails and all(set(row.get("entailed", ())) <= set(questions) for row in questions.values())
    samples = []
    for key, row in questions.items():
        sample = _read(key, row, f"{root / _FILE}, question {key}")
        details = dict(sample.details)
        if entailing and "entailed" in row:
            details["entailed"] = [other for other in row["entailed"] if other != key]
        if choices is not None:
            where = f"{root / _CHOICES}, question {key}"
            known = field(choices, (key,), where)
            details |= {name: field(known, (name,), where) for name in ("valid", "plausible")}
        samples.append(dataclasses.replace(sample, details=details))
    return BenchmarkData(root, tuple(samples))


def _read(key: str, row: dict[str, Any], where: str) -> Sample:
    image = field(row, ("imageId",), where)
    types = field(row, ("types",), where)
    structure = field(types, ("structural",), where)
    return Sample(
        id=key,
        images=(f"images/{image}.jpg",),
        question=field(row, ("question",), where),
        target=field(row, ("answer",), where),
        cluster=image,
        categories={
            "kind": "open" if structure == "query" else "binary",
            "structural": structure,
            "semantic": str(types.get("semantic", "not given")),
            "detailed": str(types.get("detailed", "not given")),
            "steps": str(number_of_steps(records(row["semantic"]))) if "semantic" in row else "not given",
            "words": str(len(row["question"].split())),
        },
        details={"group": row["groups"]["global"]} if row.get("groups") else {},
    )


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """Official and forgiving equality, and what the other scores need."""
    score, lenient = gqa_accuracy(text, sample.target), gqa_accuracy_lenient(text, sample.target)
    row = free_answer(text, score=score, score_lenient=lenient)
    for name in ("valid", "plausible"):
        if name in sample.details:
            row[name] = float(is_among(text, sample.details[name], str(sample.categories["detailed"])))
    return row | {name: sample.details[name] for name in ("group", "entailed") if name in sample.details}


BENCHMARK = Benchmark(
    name="gqa",
    split="testdev_balanced",
    version="1.2",
    reference="https://cs.stanford.edu/people/dorarad/gqa/evaluate.html",
    data_needed=f"--data-root DIR with DIR/gqa/{{{_FILE},images/*.jpg}}: "
    "https://cs.stanford.edu/people/dorarad/gqa/download.html",
    n_expected=12578,
    fingerprint=None,
    prompt_id="llava15_short",
    prompt=short_prompt,
    max_new_tokens=16,
    parser="official (eval.py after convert_gqa_for_eval.py)",
    judge=judge,
    metrics=(
        mean_of("accuracy", primary=True),
        mean_of("accuracy_lenient", "score_lenient"),
        Metric("consistency", consistency_sums, consistency, needs="entailed"),
        mean_of("validity", "valid", needs="valid"),
        mean_of("plausibility", "plausible", needs="plausible"),
        Metric(
            "distribution",
            distribution_counts,
            distribution,
            style=Style(scale=1, unit=""),
            needs="group",
            largest=None,
            higher_is_better=False,
            is_centred=True,
        ),
    ),
    breakdowns=("kind", "structural", "semantic", "detailed", "steps", "words"),
    import_predictions=importer(LLAVA, Format("GQA predictions", "questionId", "prediction")),
    layouts=(Layout((_FILE,), load, ("images/*.jpg",)),),
    hub=(
        HubSource(
            repositories=("lmms-lab/GQA", "lmms-lab-encoder/GQA"),
            splits=(("testdev_balanced_instructions", "testdev"),),
            sample=lambda row, number, where: _read(str(field(row, ("id",), where)), row, where),
            image_split=("testdev_balanced_images", "testdev"),
        ),
    ),
)
