"""SEED-Bench-1, questions about images: four options, nine kinds of understanding.

Data: https://github.com/AILab-CVC/SEED-Bench. Its own script ranks the options by likelihood; the published LLaVA
numbers come from generation, and `scripts/convert_seed_for_submission.py` of https://github.com/haotian-liu/LLaVA: the
answer must be the letter and nothing else. One question stands twice in the official files and counts once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.benchmarks.official import collect, field, find_folder, letter_prompt, read_answers
from eval.files import read_json
from eval.hub import HubSource
from eval.measures import Style, mean_of
from eval.metrics.multiple_choice import parse_exact_letter, parse_letter_lenient
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Prediction, Sample

_FOUR_DIGITS = Style(digits=4)
_TWICE = "49914"
"""The question that the official files hold two times, identically."""


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read SEED-Bench.json, its questions about images only.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a malformed record; the message names file and record.
    """
    root = find_folder("seed_bench", data_root, ["SEED-Bench.json"], BENCHMARK.data_needed)
    path = root / "SEED-Bench.json"
    content = read_json(path)
    questions = content.get("questions") if isinstance(content, dict) else None
    if not isinstance(questions, list):
        raise ValueError(f"{path}: expected an object with a list 'questions'")
    return _samples(root, path, questions)


def load_from_predictions(path: Path) -> BenchmarkData:
    """The truth of an answer file whose rows repeat `answer` and `data_type`."""
    return _samples(path.parent, path, read_answers(path))


def _samples(root: Path, path: Path, rows: list[dict[str, Any]]) -> BenchmarkData:
    where = [f"{path}, record {number}" for number in range(1, len(rows) + 1)]
    about_images = [
        (row, place) for row, place in zip(rows, where, strict=True) if field(row, ("data_type",), place) == "image"
    ]
    last = {number: at for at, number in enumerate(_numbers(about_images)) if number == _TWICE}
    samples = (
        _read(row, number, place)
        for at, ((row, place), number) in enumerate(zip(about_images, _numbers(about_images), strict=True))
        if last.get(number, at) == at
    )
    return BenchmarkData(root, tuple(samples), compared=("id", "target"))


def _numbers(rows: list[tuple[dict[str, Any], str]]) -> list[str]:
    return [str(field(row, ("question_id",), place)) for row, place in rows]


def _read(row: dict[str, Any], sample_id: str, where: str) -> Sample:
    answer = field(row, ("answer",), where)
    if answer not in ("A", "B", "C", "D"):
        raise ValueError(f"{where}: 'answer' must be A, B, C or D, found {answer!r}")
    image = str(row.get("data_id", sample_id))
    return Sample(
        id=sample_id,
        images=(f"SEED-Bench-image/{image}",),
        question=row.get("question", ""),
        target=answer,
        cluster=image,
        categories={"question_type": str(row.get("question_type_id", ""))},
        choices=tuple(row[name] for name in ("choice_a", "choice_b", "choice_c", "choice_d") if name in row),
    )


def _from_hub(row: dict[str, Any], number: int, where: str) -> Sample | None:
    if field(row, ("data_type",), where) != "image":
        return None
    return _read(row, str(field(row, ("question_id",), where)), where)


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """The letter alone, and the forgiving reading."""
    official, lenient = parse_exact_letter(text), parse_letter_lenient(text, sample.choices, number=4)
    return {
        "parsed": official,
        "parsed_lenient": lenient,
        "score": float(official == sample.target),
        "score_lenient": float(lenient == sample.target),
    }


def import_predictions(path: Path, data: BenchmarkData) -> dict[str, Prediction]:
    """Rows with `question_id` and `text` or `prediction`; those marked as videos are left out.

    Of the question that stands twice the last answer counts, as in LLaVA's script.
    """
    rows = [row for row in read_answers(path) if row.get("data_type", "image") == "image"]
    twice = [at for at, row in enumerate(rows) if str(row.get("question_id")) == _TWICE]
    kept = [row for at, row in enumerate(rows) if at not in twice[:-1]]
    return collect(
        path, data, lambda row, where: str(field(row, ("question_id",), where)), ("text", "prediction"), rows=kept
    )


BENCHMARK = Benchmark(
    name="seed_bench",
    split="image",
    version="1",
    reference="https://github.com/AILab-CVC/SEED-Bench",
    data_needed="--data-root DIR with DIR/seed_bench/{SEED-Bench.json,SEED-Bench-image/*}; to score an answer file "
    "that holds the truth (answer, data_type), neither",
    load=load,
    n_expected=14232,
    fingerprint="3f6c7476504479b3a590b5c6ae07344d40c6fb65fab91e0bbc56c39ad879e8ae",
    prompt_id="llava15_letter",
    prompt=letter_prompt,
    max_new_tokens=16,
    parser="official (LLaVA: the letter alone)",
    judge=judge,
    metrics=(
        mean_of("accuracy", primary=True, style=_FOUR_DIGITS),
        mean_of("accuracy_lenient", "score_lenient", style=_FOUR_DIGITS),
    ),
    import_predictions=import_predictions,
    load_from_predictions=load_from_predictions,
    hub=(
        HubSource(
            repositories=("lmms-lab/SEED-Bench", "lmms-lab-encoder/SEED-Bench"),
            splits=((None, "test"),),
            sample=_from_hub,
            compared=("id", "target"),
        ),
    ),
)
