"""MMMU, validation split: college questions of 30 subjects, 847 with options and 53 with free answers.

Official scorer: `mmmu/` of https://github.com/MMMU-Benchmark/MMMU (`main_parse_and_eval.py` over raw responses,
`main_eval_only.py` over read ones); data: https://huggingface.co/datasets/MMMU/MMMU. Where the official script cannot
read a letter it draws one: here such an answer is unparsed and wrong in `accuracy`, and `accuracy_with_guesses` gives
the average of the official result over its draws. The official harness shows LLaVA the first picture only and answers
questions with pictures in the options at random; here the model is shown all pictures of a question.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval.answer_files import LLAVA, AnswerFile, Format, Imported
from eval.benchmarks.official import (
    LETTER_SUFFIX,
    SHORT_SUFFIX,
    collect,
    field,
    free_answer,
    one_right_answer,
    read_object,
)
from eval.hub import HubSource, read_official_tables
from eval.layouts import Layout
from eval.measures import mean_of
from eval.metrics.mmmu import mmmu_open_is_right, parse_mmmu_choice
from eval.metrics.multiple_choice import LETTERS, parse_letter_lenient
from eval.registry import Benchmark, Submission
from eval.samples import BenchmarkData, Prediction, Sample

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
        *("Pharmacy", "Public_Health"),
    ),
    "Humanities and Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics"),
        *("Energy_and_Power", "Materials", "Mechanical_Engineering"),
    ),
}
SUBJECTS = tuple(sorted(subject for subjects in DOMAINS.values() for subject in subjects))
_CHOICE = "multiple-choice"
_ANSWERS = "answer_dict_val.json"
_IMAGE = re.compile(r"image_\d+")
_TABLES = tuple(f"{subject}/validation-*.parquet" for subject in SUBJECTS)
_COMPARED = ("id", "target", "answers")


def _from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    """A row of a table, in which a column `image_N` holds the number of images there: 1 or 0."""
    return _read(row, sorted(name for name, value in row.items() if _IMAGE.fullmatch(name) and value), where)


def _read(row: Mapping[str, Any], images: Sequence[str], where: str) -> Sample:
    number, answer = str(field(row, ("id",), where)), str(field(row, ("answer",), where))
    choices: tuple[str, ...] = ()
    answers = _texts(answer) if answer.startswith(("['", '["')) else (answer,)
    if field(row, ("question_type",), where) == _CHOICE:
        choices, answers = _texts(field(row, ("options",), where)), (answer,)
        if len(answer) != 1 or answer not in LETTERS[: len(choices)]:
            raise ValueError(f"{where}: 'answer' must be the letter of one of {len(choices)} options, found {answer!r}")
    if not answers:
        raise ValueError(f"{where}: 'answer' must be a text or a list of texts, found {answer!r}")
    pictures = tuple(f"{number}/{image}.png" for image in images)
    question = str(field(row, ("question",), where))
    return _sample(number, answers, bool(choices), where, question=question, choices=choices, images=pictures)


def _texts(literal: str) -> tuple[str, ...]:
    """The list that the tables hold as a Python literal; () if it is none."""
    try:
        values = ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        return ()
    return tuple(map(str, values)) if isinstance(values, list) else ()


def _sample(
    number: str,
    answers: tuple[str, ...],
    is_choice: bool,
    where: str,
    *,
    question: str = "",
    choices: tuple[str, ...] = (),
    images: tuple[str, ...] = (),
) -> Sample:
    subject = _subject(number)
    domain = next((name for name, subjects in DOMAINS.items() if subject in subjects), None)
    if domain is None:
        raise ValueError(f"{where}: 'id' must be validation_SUBJECT_NUMBER, found {number!r}")
    kind = _CHOICE if is_choice else "open"
    return Sample(
        id=number,
        images=images,
        question=question,
        target=answers[0],
        cluster=number,
        categories={"domain": domain, "subject": subject, "question_type": kind},
        answers=answers,
        choices=choices,
    )


def _subject(number: str) -> str:
    return "_".join(number.split("_")[1:-1])


def load_truth(root: Path) -> BenchmarkData:
    """Read answer_dict_val.json, enough to score answers whose letters are read; raw ones need the tables' options."""
    path = root / _ANSWERS
    records = ((f"{path}, {number!r}", {"id": number, **truth}) for number, truth in read_object(path).items())
    return _truth(root, records)


def load_from_predictions(answers: AnswerFile) -> BenchmarkData:
    """The truth of an official output file, whose rows repeat `question_type`, `answer` and the options."""
    return _truth(answers.files[0].parent, [(row.where, row.values) for row in answers.entries("id", "response").rows])


def _truth(root: Path, records: Iterable[tuple[str, Mapping[str, Any]]]) -> BenchmarkData:
    """Samples without question; the picture they name is the table that would have to be there to be shown one."""
    samples = []
    for where, row in records:
        answer = field(row, ("ground_truth", "answer"), where)
        answers = tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)
        number = str(field(row, ("id",), where))
        is_choice = field(row, ("question_type",), where) == _CHOICE
        choices = tuple(map(str, row.get("index2ans", {}).values()))
        table = f"{_subject(number)}/validation-00000-of-00001.parquet"
        samples.append(_sample(number, answers, is_choice, where, choices=choices, images=(table,)))
    return BenchmarkData(root, tuple(samples), compared=_COMPARED)


def prompt(sample: Sample) -> str:
    """The official prompts (`configs/llava1.5.yaml`): options in parentheses; `<image 1>` stays in the text."""
    if sample.categories["question_type"] != _CHOICE:
        return f"{sample.question}\n{SHORT_SUFFIX}"
    options = "".join(f"({letter}) {choice}\n" for letter, choice in zip(LETTERS, sample.choices, strict=False))
    return f"{sample.question}\n\n{options}\n{LETTER_SUFFIX}"


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """The official reading and the forgiving one (of letters; the official one of free answers forgives enough).

    `score_with_guesses` is the chance that the official script is right: one in the number of options where it draws.
    """
    if sample.categories["question_type"] != _CHOICE:
        score = float(mmmu_open_is_right(text, sample.answers))
        return free_answer(text, **dict.fromkeys(("score", "score_lenient", "score_with_guesses"), score))
    if sample.choices:
        official = parse_mmmu_choice(text, sample.choices)
        lenient = official or parse_letter_lenient(text, sample.choices)
    else:
        official = lenient = _only_letter(text, sample)
    guess = 1 / len(sample.choices) if official is None and sample.choices else 0.0
    row = one_right_answer(official, lenient, sample)
    return row | {"score_with_guesses": row["score"] or guess}


def _only_letter(text: str, sample: Sample) -> str | None:
    """The letter that was read elsewhere; None for ""."""
    if len(text) > 1 or text not in LETTERS:
        raise ValueError(
            f"{sample.id}: {text[:40]!r} is no letter, and only the tables have the options to read it by: give "
            "--data-root DIR with DIR/mmmu/SUBJECT/validation-*.parquet"
        )
    return text or None


def import_predictions(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """The official {id: answer}, the official list of rows with `response`, or LLaVA's rows with `question_id`."""
    return collect(answers.entries("id", "response"), data, (Format("MMMU outputs", "id", "response"), LLAVA))


def write_submission(data: BenchmarkData, predictions: Mapping[str, Prediction]) -> str:
    """The object id -> answer that `main_eval_only.py` scores; "" where no letter could be read."""
    answers = {}
    for sample in data.samples:
        text = predictions[sample.id].text
        is_choice = sample.categories["question_type"] == _CHOICE
        answers[sample.id] = (judge(text, sample)["parsed"] or "") if is_choice else text
    return json.dumps(answers, indent=1, ensure_ascii=False)


_HUB = HubSource(
    repositories=("MMMU/MMMU",),
    splits=tuple((subject, "validation") for subject in SUBJECTS),
    sample=_from_hub,
    compared=_COMPARED,
)

BENCHMARK = Benchmark(
    name="mmmu",
    split="validation",
    version="bb0b95a9",
    reference="https://github.com/MMMU-Benchmark/MMMU",
    data_needed="--data-root DIR with DIR/mmmu/SUBJECT/validation-*.parquet for the 30 subjects: "
    f"huggingface.co/datasets/MMMU/MMMU; to score answers whose letters are read, DIR/mmmu/{_ANSWERS}; to score an "
    "official output file that holds options and truth, neither",
    n_expected=900,
    fingerprint=None,
    prompt_id="mmmu_llava15",
    prompt=prompt,
    max_new_tokens=128,
    parser="official (eval_utils.py), unread letters = wrong",
    judge=judge,
    metrics=(
        mean_of("accuracy", primary=True),
        mean_of("accuracy_with_guesses", "score_with_guesses"),
        mean_of("accuracy_lenient", "score_lenient"),
    ),
    cluster="question",
    layouts=(
        Layout(_TABLES, partial(read_official_tables, _HUB)),
        Layout((_ANSWERS,), load_truth, _TABLES),
    ),
    hub=(
        _HUB,
        dataclasses.replace(
            _HUB, repositories=("lmms-lab/MMMU", "lmms-lab-encoder/MMMU"), splits=((None, "validation"),)
        ),
    ),
    breakdowns=("domain", "subject", "question_type"),
    import_predictions=import_predictions,
    load_from_predictions=load_from_predictions,
    submission=Submission("mmmu_val_output.json", write_submission),
)
