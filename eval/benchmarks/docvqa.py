"""DocVQA: questions about scanned pages of industry documents. `docvqa` is val; `docvqa_test` the test server's.

Official scorer: see documents.py; ANLS is the headline. Data: https://rrc.cvc.uab.es/?ch=17, task 1 (single page); the
files `..._withQT.json` also have each question's types, of which it may have several. Pages of one document belong
together: they are one cluster.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from eval.benchmarks.documents import MAX_NEW_TOKENS, METRICS, judge, load_rrc, write_submission
from eval.benchmarks.official import by_question_id, short_prompt
from eval.benchmarks.soft_accuracy import unscored_judge
from eval.registry import Benchmark, Submission
from eval.samples import BenchmarkData

_IMAGES = "spdocvqa_images"
_VAL = {
    "spdocvqa_qas/val_v1.0_withQT.json": _IMAGES,
    "val_v1.0_withQT.json": _IMAGES,
    "val/val_v1.0.json": "val/documents",
}
_TEST = {"spdocvqa_qas/test_v1.0.json": _IMAGES, "test_v1.0.json": _IMAGES, "test/test_v1.0.json": "test/documents"}


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read the questions of val; errors as `load_rrc`."""
    return _load(data_root, _VAL, BENCHMARK.data_needed, scored=True)


def load_test(data_root: Path | None = None) -> BenchmarkData:
    """Read the questions of test, which have no public answers; errors as `load_rrc`."""
    return _load(data_root, _TEST, BENCHMARK_TEST.data_needed, scored=False)


def _load(data_root: Path | None, layouts: dict[str, str], data_needed: str, scored: bool) -> BenchmarkData:
    return load_rrc(
        "docvqa",
        data_root,
        layouts,
        data_needed,
        image="image",
        document=("ucsf_document_id",),
        types={"question_type": "question_types"} if scored else {},
        scored=scored,
    )


BENCHMARK = Benchmark(
    name="docvqa",
    split="val",
    version="1.0",
    reference="https://rrc.cvc.uab.es/?ch=17",
    data_needed="--data-root DIR with DIR/docvqa/{spdocvqa_qas/val_v1.0_withQT.json,spdocvqa_images/*.png}, or as "
    "first published DIR/docvqa/val/{val_v1.0.json,documents/*.png}: https://rrc.cvc.uab.es/?ch=17&com=downloads",
    load=load,
    n_expected=5349,
    fingerprint=None,
    prompt_id="llava15_short",
    prompt=short_prompt,
    max_new_tokens=MAX_NEW_TOKENS,
    parser="official (RRC evaluator)",
    judge=judge,
    metrics=METRICS,
    cluster="document",
    breakdowns=("question_type",),
    import_predictions=by_question_id,
)

BENCHMARK_TEST = dataclasses.replace(
    BENCHMARK,
    name="docvqa_test",
    split="test",
    data_needed="--data-root DIR with DIR/docvqa/{spdocvqa_qas/test_v1.0.json,spdocvqa_images/*.png}, or as first "
    "published DIR/docvqa/test/{test_v1.0.json,documents/*.png}: https://rrc.cvc.uab.es/?ch=17&com=downloads",
    load=load_test,
    n_expected=5188,
    judge=unscored_judge,
    metrics=(),
    breakdowns=(),
    submission=Submission("docvqa_test_submission.json", write_submission),
)
