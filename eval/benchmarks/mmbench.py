"""MMBench dev (English): multiple choice, each question asked with its options rotated; right only if right every time.

Data and pipeline: https://github.com/open-compass/MMBench. The official pipeline reads odd answers with ChatGPT and
guesses where that fails; here its offline heuristics read them (VLMEvalKit's `--judge exact_matching`), and what they
cannot read is wrong. `first_pass` and `all_rotations` are not for reporting: they are higher.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.answer_files import LLAVA, AnswerFile, Format, Imported
from eval.benchmarks.official import (
    collect,
    field,
    find_folder,
    judged,
    letter_prompt,
    located,
    read_table,
    table_images,
)
from eval.files import shown
from eval.hub import HubSource
from eval.layouts import Layout
from eval.measures import Metric, Row, Style, mean_of
from eval.metrics.multiple_choice import circular_sums, parse_letter_lenient, parse_mmbench
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample
from eval.stored_images import StoredImages, file_identity

_FILE = "mmbench_dev_20230712.tsv"
_ROTATION = 1_000_000
_FOUR_DIGITS = Style(digits=4)


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read the official table, in which the images stand too.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: a malformed record; the message names it.
    """
    root = find_folder("mmbench", data_root, [_FILE], BENCHMARK.data_needed)
    path = root / _FILE
    images = StoredImages.in_cache("mmbench", file_identity(path), functools.partial(_read_images, path))
    return dataclasses.replace(_samples(root, located(read_table(path), path)), stored_images=images)


def _read_images(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    return table_images(path, {name: Path(name).stem for name in names})


def load_from_predictions(answers: AnswerFile) -> BenchmarkData:
    """The truth of an answer table, whose rows repeat options and `answer`."""
    return _samples(answers.files[0].parent, ((row.where, row.values) for row in answers.rows))


def _samples(root: Path, records: Iterable[tuple[str, dict[str, Any]]]) -> BenchmarkData:
    return BenchmarkData(root, tuple(_read(row, where) for where, row in records), compared=("id", "target"))


def _index(row: dict[str, Any], where: str) -> int:
    value = field(row, ("index", "question_id"), where)
    try:
        return int(float(value))
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: 'index' must be a number, found {shown(value)}") from error


def _read(row: dict[str, Any], where: str) -> Sample:
    index, answer = _index(row, where), field(row, ("answer",), where)
    choices = [str(row.get(letter) or "") for letter in "ABCD"]
    while choices and choices[-1] in ("", "nan"):
        choices.pop()
    if len(answer) != 1 or answer not in "ABCD"[: len(choices)]:
        raise ValueError(f"{where}: 'answer' must be the letter of an option, found {answer!r}")
    hint = row.get("hint") or ""
    group = str(index % _ROTATION)
    return Sample(
        id=str(index),
        images=(f"{group}.jpg",),
        question=(f"{hint}\n" if hint and hint != "nan" else "") + (row.get("question") or ""),
        target=answer,
        cluster=group,
        categories={"category": row.get("category") or "", "rotation": str(index // _ROTATION)},
        choices=tuple(choices),
    )


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """The offline heuristics and the forgiving reading; `group` is the question, whatever its rotation."""
    official, lenient = parse_mmbench(text, sample.choices), parse_letter_lenient(text, sample.choices)
    return judged(official, lenient, sample) | {"group": sample.cluster}


def import_predictions(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """LLaVA's rows, or an answer table (.xlsx, .tsv), whose `answer` must be the truth of the data."""
    truth = {sample.id: sample.target for sample in data.samples}

    def find_id(row: dict[str, Any], where: str) -> str:
        sample_id = str(_index(row, where))
        expected = truth.get(sample_id)
        if "prediction" in row and row.get("answer", expected) != expected:
            found = shown(row["answer"])
            raise ValueError(f"{where}: 'answer' is {found}, the data say {expected!r}: another version of MMBench?")
        return sample_id

    return collect(answers, data, (Format("MMBench answer table", "index", "prediction"), LLAVA), find_id)


def _circular(key: str) -> Callable[[Sequence[Row]], np.ndarray]:
    return lambda rows: circular_sums(rows, "group", key)


def _first_pass(rows: Sequence[Row]) -> np.ndarray:
    first = [float(row["categories"]["rotation"] == "0") for row in rows]
    return np.array([[weight * row["score"], weight] for weight, row in zip(first, rows, strict=True)])


BENCHMARK = Benchmark(
    name="mmbench",
    split="dev",
    version="20230712",
    reference="https://github.com/open-compass/MMBench",
    data_needed=f"--data-root DIR with DIR/mmbench/{_FILE}, which holds the images too; to score an answer table "
    "that holds the truth, not even that",
    load=load,
    n_expected=4377,
    fingerprint="2fa4eef32eb2f76882d5a204545cb20b8b882e114bcd8bde6c3a804d56cc2b63",
    prompt_id="llava15_letter_hint",
    prompt=letter_prompt,
    max_new_tokens=16,
    parser="offline heuristics of MMBench, unread = wrong",
    judge=judge,
    metrics=(
        Metric("circular_accuracy", _circular("score"), primary=True, style=_FOUR_DIGITS),
        Metric("circular_accuracy_lenient", _circular("score_lenient"), style=_FOUR_DIGITS),
        Metric("first_pass", _first_pass, style=_FOUR_DIGITS),
        mean_of("all_rotations", style=_FOUR_DIGITS),
    ),
    cluster="question with its rotations",
    import_predictions=import_predictions,
    load_from_predictions=load_from_predictions,
    layouts=(Layout((_FILE,)),),
    hub=tuple(
        HubSource(
            repositories=repositories,
            splits=splits,
            sample=lambda row, number, where: _read(row, where),
            differs="a later edition, with 1,164 instead of 1,176 questions (4,329 instead of 4,377 with rotations)",
            counts=(4329,),
            compared=("id", "target"),
        )
        for repositories, splits in (
            (("lmms-lab/MMBench", "lmms-lab-encoder/MMBench"), (("en", "dev"),)),
            (("lmms-lab/MMBench_EN",), ((None, "dev"),)),
        )
    ),
)
