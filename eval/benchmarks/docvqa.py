"""DocVQA: questions about scanned pages of industry documents. `docvqa` is val; `docvqa_test` the test server's.

Official scorer: see documents.py; ANLS is the headline. Data: https://rrc.cvc.uab.es/?ch=17, task 1 (single page); the
files `..._withQT.json` also have each question's types, of which it may have several. Pages of one document belong
together: they are one cluster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eval.answer_files import LLAVA
from eval.benchmarks.documents import (
    COMPARED,
    MAX_NEW_TOKENS,
    METRICS,
    SUBMISSION,
    judge,
    rrc_layouts,
    rrc_sample,
    write_submission,
)
from eval.benchmarks.official import field, importer, short_prompt, unscored_judge
from eval.hub import HubSource
from eval.layouts import Layout
from eval.registry import Benchmark, Submission
from eval.samples import Sample

_IMAGES = "spdocvqa_images"
_VAL = {
    "spdocvqa_qas/val_v1.0_withQT.json": _IMAGES,
    "val_v1.0_withQT.json": _IMAGES,
    "val/val_v1.0.json": "val/documents",
}
_TYPES = {"question_type": "question_types"}
_TEST = {"spdocvqa_qas/test_v1.0.json": _IMAGES, "test_v1.0.json": _IMAGES, "test/test_v1.0.json": "test/documents"}


def _from_hub(row: dict[str, Any], where: str, types: Mapping[str, str] | None) -> Sample:
    document = str(field(row, ("ucsf_document_id",), where))
    image = f"{_IMAGES}/{document}_{field(row, ('ucsf_document_page_no',), where)}.png"
    official = row | {"questionId": int(field(row, ("questionId",), where))}
    return rrc_sample(official, where, image, document, types)


def _hub(split: str, types: Mapping[str, str] | None) -> HubSource:
    return HubSource(
        repositories=("lmms-lab/DocVQA", "lmms-lab-encoder/DocVQA"),
        splits=(("DocVQA", split),),
        sample=lambda row, number, where: _from_hub(row, where, types),
        compared=COMPARED,
    )


def _layouts(files: Mapping[str, str], types: Mapping[str, str] | None) -> tuple[Layout, ...]:
    return rrc_layouts(files, ".png", image="image", document=("ucsf_document_id",), types=types)


BENCHMARK = Benchmark(
    name="docvqa",
    split="val",
    version="1.0",
    reference="https://rrc.cvc.uab.es/?ch=17",
    data_needed="--data-root DIR with DIR/docvqa/{spdocvqa_qas/val_v1.0_withQT.json,spdocvqa_images/*.png}, or as "
    "first published DIR/docvqa/val/{val_v1.0.json,documents/*.png}: https://rrc.cvc.uab.es/?ch=17&com=downloads",
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
    import_predictions=importer(LLAVA, SUBMISSION),
    layouts=_layouts(_VAL, _TYPES),
    hub=(_hub("validation", _TYPES),),
)

BENCHMARK_TEST = dataclasses.replace(
    BENCHMARK,
    name="docvqa_test",
    split="test",
    data_needed="--data-root DIR with DIR/docvqa/{spdocvqa_qas/test_v1.0.json,spdocvqa_images/*.png}, or as first "
    "published DIR/docvqa/test/{test_v1.0.json,documents/*.png}: https://rrc.cvc.uab.es/?ch=17&com=downloads",
    n_expected=5188,
    judge=unscored_judge,
    metrics=(),
    breakdowns=(),
    layouts=_layouts(_TEST, None),
    shares_folder="docvqa",
    hub=(_hub("test", None),),
    submission=Submission("docvqa_test_submission.json", write_submission),
)
