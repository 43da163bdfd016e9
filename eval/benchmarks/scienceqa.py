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

from eval.answer_files import LLAVA, AnswerFile, AnswerRow, Format, Imported
from eval.benchmarks.official import collect, field, find_folder, judged, letter_prompt
from eval.files import read_json, shown
from eval.hub import HubSource
from eval.layouts import Layout
from eval.measures import Metric, Row, mean_of
from eval.metrics.multiple_choice import LETTERS, parse_letter_lenient, parse_science_qa
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample

_FORMATS = (
    Format("LLaVA's analysis", "question_id", "pred"),
    Format("LLaVA's outputs", "question_id", "output"),
    Format("ScienceQA results", "question_id", "result"),
)
_FILES = ("problems.json", "pid_splits.json")


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read problems.json, in the order that pid_splits.json gives the test split.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a malformed problem; the message names file and problem.
    """
    root = find_folder("scienceqa", data_root, _FILES, BENCHMARK.data_needed)
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
    return judged(official, lenient, sample)


def import_predictions(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """LLaVA's rows, what its scorer writes of them (`_output.jsonl`, `_result.json`), or ScienceQA's {"results"}.

    LLaVA's scorer writes "FAILED" for a question without answer: these rows are left out. Of bare results, the
    positions of choices, -1 is an answer that could not be read.
    """
    whole = answers.rows[0]
    if "correct" in whole.values and "incorrect" in whole.values:
        answers = answers.with_rows(_from_analysis(whole))
    elif "results" in whole.values:
        answers = answers.with_rows(_from_results(whole, data))

    def leave_out(row: dict[str, Any]) -> str | None:
        return "FAILED, without answer" if "FAILED" in (row.get("pred"), row.get("output")) else None

    return collect(answers, data, (LLAVA, *_FORMATS), leave_out=leave_out)


def _from_analysis(whole: AnswerRow) -> list[AnswerRow]:
    """The rows of {"correct": [...], "incorrect": [...]}."""
    found = []
    for name in ("correct", "incorrect"):
        rows = whole.values[name]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{whole.file}: {name!r} must be a list of objects")
        found += [AnswerRow(f"{whole.file}, {name}, record {at}", whole.file, row) for at, row in enumerate(rows, 1)]
    return found


def _from_results(whole: AnswerRow, data: BenchmarkData) -> list[AnswerRow]:
    """The rows of {"results": {id: position of a choice}} or, where it is there, of {"outputs": {id: text}}."""
    choices = {sample.id: len(sample.choices) for sample in data.samples}
    name, text_field = ("outputs", "output") if "outputs" in whole.values else ("results", "result")
    entries = whole.values[name]
    if not isinstance(entries, dict):
        raise ValueError(f"{whole.file}: {name!r} must be an object")
    found = []
    for key, value in entries.items():
        where = f"{whole.file}, {name}, question {shown(key)}"
        if name == "results":
            if not isinstance(value, int) or not -1 <= value < choices.get(key, len(LETTERS)):
                raise ValueError(f"{where}: expected the position of a choice, or -1, found {shown(value)}")
            value = "" if value < 0 else LETTERS[value]
        found.append(AnswerRow(where, whole.file, {"question_id": key, text_field: value}))
    return found


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
    import_predictions=import_predictions,
    layouts=(Layout(_FILES, ("images/test/*/*",)),),
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
