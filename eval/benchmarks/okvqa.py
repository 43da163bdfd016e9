"""OK-VQA, val2014: questions that need knowledge beyond the image.

Official scorer: that of VQAv2, on the field `answer` (https://okvqa.allenai.org). In version 1.0 of the data `answer`
is stemmed; predictions are compared as they are ("raw"): nothing is lemmatised, unlike in OpenFlamingo and LAVIS.
LLaVA-1.5 publishes no number; the prompt is its short form.
"""

from __future__ import annotations

from typing import Any

from eval.answer_files import LLAVA
from eval.benchmarks.official import field, importer, short_prompt
from eval.benchmarks.soft_accuracy import METRICS, VQA_SUBMISSION, soft_judge, vqa_layout, vqa_sample
from eval.hub import HubSource
from eval.registry import Benchmark
from eval.samples import Sample

_QUESTIONS = "OpenEnded_mscoco_val2014_questions.json"
_ANNOTATIONS = "mscoco_val2014_annotations.json"
_IMAGE = "val2014/COCO_val2014_{:012d}.jpg"


def _from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    """The dataset does not name the image, but a question's number is its image's with one more digit."""
    image = int(field(row, ("question_id",), where)) // 10
    answers = [{"answer": answer} for answer in field(row, ("answers",), where)]
    return vqa_sample(row | {"image_id": image}, {"answers": answers}, _IMAGE, where)


BENCHMARK = Benchmark(
    name="okvqa",
    split="val2014",
    version="1.1",
    reference="https://okvqa.allenai.org",
    data_needed=f"--data-root DIR with DIR/okvqa/{{{_QUESTIONS},{_ANNOTATIONS},val2014/COCO_val2014_*.jpg}}: "
    "https://okvqa.allenai.org/download.html",
    n_expected=5046,
    fingerprint=None,
    prompt_id="llava15_short",
    prompt=short_prompt,
    max_new_tokens=16,
    parser="official (vqaEval.py), raw predictions",
    judge=soft_judge("official"),
    metrics=METRICS,
    import_predictions=importer(LLAVA, VQA_SUBMISSION),
    layouts=(vqa_layout(_QUESTIONS, _ANNOTATIONS, _IMAGE),),
    hub=(
        HubSource(
            repositories=("lmms-lab/OK-VQA", "lmms-lab-encoder/OK-VQA"),
            splits=((None, "val2014"),),
            sample=_from_hub,
            differs="whether its `answers` are the stemmed or the raw ones is not documented",
        ),
    ),
)
