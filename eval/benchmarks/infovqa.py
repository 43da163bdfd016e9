"""InfographicVQA: questions about infographics. `infovqa` is val; `infovqa_test` the test server's.

Official scorer: see documents.py; ANLS is the headline. Data: https://rrc.cvc.uab.es/?ch=17, task 3; the file
`..._withQT.json` also has the three kinds of labels by which the official evaluator breaks its score down, where a
question counts under each of its labels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from eval.benchmarks.documents import MAX_NEW_TOKENS, METRICS, judge, load_rrc, write_submission
from eval.benchmarks.official import by_question_id, short_prompt
from eval.benchmarks.soft_accuracy import unscored_judge
from eval.registry import Benchmark, Submission
from eval.samples import BenchmarkData

_IMAGES = "infographicsvqa_images"
_VAL_FILE = "infographicsVQA_val_v1.0_withQT.json"
_TEST_FILE = "infographicsVQA_test_v1.0.json"
_VAL = {f"infographicsvqa_qas/{_VAL_FILE}": _IMAGES, _VAL_FILE: _IMAGES, "val/val_v1.0.json": "val"}
_TEST = {f"infographicsvqa_qas/{_TEST_FILE}": _IMAGES, _TEST_FILE: _IMAGES, "test/test_v1.0.json": "test"}
_TYPES = {"answer_type": "answer_type", "evidence": "evidence", "operation": "operation/reasoning"}


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read the questions of val; errors as `load_rrc`."""
    return _load(data_root, _VAL, BENCHMARK.data_needed, scored=True)


def load_test(data_root: Path | None = None) -> BenchmarkData:
    """Read the questions of test, which have no public answers; errors as `load_rrc`."""
    return _load(data_root, _TEST, BENCHMARK_TEST.data_needed, scored=False)


def _load(data_root: Path | None, layouts: dict[str, str], data_needed: str, scored: bool) -> BenchmarkData:
    return load_rrc(
        "infovqa",
        data_root,
        layouts,
        data_needed,
        image="image_local_name",
        document=(),
        types=_TYPES if scored else {},
        scored=scored,
    )


BENCHMARK = Benchmark(
    name="infovqa",
    split="val",
    version="1.0",
    reference="https://rrc.cvc.uab.es/?ch=17",
    data_needed=f"--data-root DIR with DIR/infovqa/{{infographicsvqa_qas/{_VAL_FILE},{_IMAGES}/*.jpeg}}, or as first "
    "published DIR/infovqa/val/{val_v1.0.json,*.jpeg}: https://rrc.cvc.uab.es/?ch=17&com=downloads",
    load=load,
    n_expected=2801,
    fingerprint=None,
    prompt_id="llava15_short",
    prompt=short_prompt,
    max_new_tokens=MAX_NEW_TOKENS,
    parser="official (RRC evaluator)",
    judge=judge,
    metrics=METRICS,
    breakdowns=tuple(_TYPES),
    import_predictions=by_question_id,
)

BENCHMARK_TEST = dataclasses.replace(
    BENCHMARK,
    name="infovqa_test",
    split="test",
    data_needed=f"--data-root DIR with DIR/infovqa/{{infographicsvqa_qas/{_TEST_FILE},{_IMAGES}/*.jpeg}}, or as first "
    "published DIR/infovqa/test/{test_v1.0.json,*.jpeg}: https://rrc.cvc.uab.es/?ch=17&com=downloads",
    load=load_test,
    n_expected=3288,
    judge=unscored_judge,
    metrics=(),
    breakdowns=(),
    submission=Submission("infovqa_test_submission.json", write_submission),
)
