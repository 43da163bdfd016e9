"""InfographicVQA: questions about infographics. `infovqa` is val; `infovqa_test` the test server's.

Official scorer: see documents.py; ANLS is the headline. Data: https://rrc.cvc.uab.es/?ch=17, task 3; the file
`..._withQT.json` also has the three kinds of labels by which the official evaluator breaks its score down, where a
question counts under each of its labels.
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
from eval.files import sha256_of_json
from eval.hub import HubSource
from eval.layouts import Layout
from eval.registry import Benchmark, Submission
from eval.samples import Sample

_IMAGES = "infographicsvqa_images"
_VAL_FILE = "infographicsVQA_val_v1.0_withQT.json"
_TEST_FILE = "infographicsVQA_test_v1.0.json"
_VAL = {f"infographicsvqa_qas/{_VAL_FILE}": _IMAGES, _VAL_FILE: _IMAGES, "val/val_v1.0.json": "val"}
_TEST = {f"infographicsvqa_qas/{_TEST_FILE}": _IMAGES, _TEST_FILE: _IMAGES, "test/test_v1.0.json": "test"}
_TYPES = {"answer_type": "answer_type", "evidence": "evidence", "operation": "operation/reasoning"}


def _from_hub(row: dict[str, Any], where: str, types: Mapping[str, str] | None) -> Sample:
    picture = str(field(row, ("image_local_name", "image_url"), where))
    name = picture if "image_local_name" in row else f"{sha256_of_json(picture)[:16]}.jpeg"
    official = row | {"questionId": int(field(row, ("questionId",), where))}
    return rrc_sample(official, where, f"{_IMAGES}/{name}", picture, types)


def _hub(split: str, types: Mapping[str, str] | None) -> HubSource:
    return HubSource(
        repositories=("lmms-lab/DocVQA", "lmms-lab-encoder/DocVQA"),
        splits=(("InfographicVQA", split),),
        sample=lambda row, number, where: _from_hub(row, where, types),
        differs="labels of the kind of evidence may be missing; images are told apart by their address",
        compared=COMPARED,
    )


def _layouts(files: Mapping[str, str], types: Mapping[str, str] | None) -> tuple[Layout, ...]:
    return rrc_layouts(files, ".jpeg", image="image_local_name", types=types)


BENCHMARK = Benchmark(
    name="infovqa",
    split="val",
    version="1.0",
    reference="https://rrc.cvc.uab.es/?ch=17",
    data_needed=f"--data-root DIR with DIR/infovqa/{{infographicsvqa_qas/{_VAL_FILE},{_IMAGES}/*.jpeg}}, or as first "
    "published DIR/infovqa/val/{val_v1.0.json,*.jpeg}: https://rrc.cvc.uab.es/?ch=17&com=downloads",
    n_expected=2801,
    fingerprint=None,
    prompt_id="llava15_short",
    prompt=short_prompt,
    max_new_tokens=MAX_NEW_TOKENS,
    parser="official (RRC evaluator)",
    judge=judge,
    metrics=METRICS,
    breakdowns=tuple(_TYPES),
    import_predictions=importer(LLAVA, SUBMISSION),
    layouts=_layouts(_VAL, _TYPES),
    hub=(_hub("validation", _TYPES),),
)

BENCHMARK_TEST = dataclasses.replace(
    BENCHMARK,
    name="infovqa_test",
    split="test",
    data_needed=f"--data-root DIR with DIR/infovqa/{{infographicsvqa_qas/{_TEST_FILE},{_IMAGES}/*.jpeg}}, or as first "
    "published DIR/infovqa/test/{test_v1.0.json,*.jpeg}: https://rrc.cvc.uab.es/?ch=17&com=downloads",
    n_expected=3288,
    judge=unscored_judge,
    metrics=(),
    breakdowns=(),
    layouts=_layouts(_TEST, None),
    shares_folder="infovqa",
    hub=(_hub("test", None),),
    submission=Submission("infovqa_test_submission.json", write_submission),
)
