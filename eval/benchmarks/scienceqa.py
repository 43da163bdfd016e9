"""ScienceQA, test split: school questions with 2 to 5 options; "IMG" are the 2,017 of 4,241 that have an image.

Official scorer of the published numbers: `llava/eval/eval_science_qa.py` of https://github.com/haotian-liu/LLaVA. Data:
https://github.com/lupantech/ScienceQA. The accuracy over all questions is the headline, as LLaVA prints it;
`accuracy_img` is ScienceQA-IMG. Where ScienceQA's own script would guess (an unread answer), LLaVA's counts wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.official import by_question_id, field, find_folder, letter_prompt
from eval.files import read_json
from eval.hub import HubSource
from eval.measures import Metric, Row, mean_of
from eval.metrics.multiple_choice import LETTERS, parse_letter_lenient, parse_science_qa
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read problems.json, in the order that pid_splits.json gives the test split.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a malformed problem; the message names file and problem.
    """
    root = find_folder("scienceqa", data_root, ["problems.json", "pid_splits.json"], BENCHMARK.data_needed)
    problems, splits = read_json(root / "problems.json"), read_json(root / "pid_splits.json")
    test = splits.get("test") if isinstance(splits, dict) else None
    if not isinstance(test, list) or not isinstance(problems, dict):
        raise ValueError(f"{root}: pid_splits.json must hold a list 'test', problems.json an object")
    samples = []
    for number in map(str, test):
        where = f"{root / 'problems.json'}, problem {number}"
        if number not in problems:
            raise ValueError(f"{where}: missing")
        samples.append(_read(problems[number], number, where))
    return BenchmarkData(root, tuple(samples), compared=("id", "target", "choices"))


def _read(problem: dict[str, Any], number: str, where: str) -> Sample:
    choices, answer = field(problem, ("choices",), where), field(problem, ("answer",), where)
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: 'answer' must be the position of a choice, found {answer!r}")
    context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
    image = problem.get("image")
    return Sample(
        id=number,
        images=(f"images/test/{number}/{image}",) if image else (),
        question=context + problem.get("question", ""),
        target=LETTERS[answer],
        cluster=number,
        categories={"image": "with image" if image else "without image"},
        choices=tuple(choices),
    )


def _from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    return _read(row | {"image": "image.png" if row.get("image") else None}, f"row-{number}", where)


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """LLaVA's reading and the forgiving one; a letter beyond the options is wrong."""
    official, lenient = parse_science_qa(text), parse_letter_lenient(text, sample.choices)
    return {
        "parsed": official,
        "parsed_lenient": lenient,
        "score": float(official == sample.target),
        "score_lenient": float(lenient == sample.target),
    }


def _with_image(key: str) -> Callable[[Sequence[Row]], np.ndarray]:
    def summands(rows: Sequence[Row]) -> np.ndarray:
        shown = [float(row["categories"]["image"] == "with image") for row in rows]
        return np.array([[weight * row[key], weight] for weight, row in zip(shown, rows, strict=True)])

    return summands


BENCHMARK = Benchmark(
    name="scienceqa",
    split="test",
    version="2cbf8318",
    reference="https://github.com/lupantech/ScienceQA",
    data_needed="--data-root DIR with DIR/scienceqa/{problems.json,pid_splits.json,images/test/ID/image.png}",
    load=load,
    n_expected=4241,
    fingerprint="e1f500c7fe455097fec6a1336e676b0501f48eed008a1be269fa3b855d5cfcd0",
    prompt_id="llava15_letter_context",
    prompt=letter_prompt,
    max_new_tokens=16,
    parser="official (llava/eval/eval_science_qa.py)",
    judge=judge,
    metrics=(
        mean_of("accuracy", primary=True),
        Metric("accuracy_img", _with_image("score")),
        mean_of("accuracy_lenient", "score_lenient"),
        Metric("accuracy_img_lenient", _with_image("score_lenient")),
    ),
    cluster="question",
    import_predictions=by_question_id,
    hub=tuple(
        HubSource(
            repositories=repositories,
            splits=((configuration, "test"),),
            sample=_from_hub,
            differs="it does not give the problems' numbers: identifiers are row-NUMBER, not the official ones",
            compared=("id", "target", "choices"),
        )
        for repositories, configuration in (
            (("lmms-lab/ScienceQA", "lmms-lab-encoder/ScienceQA"), "ScienceQA-FULL"),
            (("derek-thomas/ScienceQA",), None),
        )
    ),
)
