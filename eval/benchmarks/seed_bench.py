"""SEED-Bench-1, questions about images: four options, nine kinds of understanding.

Data: https://github.com/AILab-CVC/SEED-Bench. Its own script ranks the options by likelihood; the published LLaVA
numbers come from generation, and `scripts/convert_seed_for_submission.py` of https://github.com/haotian-liu/LLaVA: the
answer must be the letter and nothing else. One question stands twice in the official files and counts once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.answer_files import LLAVA, AnswerFile, Format, Imported
from eval.benchmarks.official import collect, field, letter_prompt, one_right_answer, read_records
from eval.hub import HubSource
from eval.layouts import Layout
from eval.measures import Style, mean_of
from eval.metrics.multiple_choice import parse_exact_letter, parse_letter_lenient
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample

_FILE = "SEED-Bench.json"
_SUBMISSION = Format("SEED-Bench submission", "question_id", "prediction")
_FOUR_DIGITS = Style(digits=4)
_TWICE = "49914"
"""The question that the official files hold two times, identically."""


def load(root: Path) -> BenchmarkData:
    """Read SEED-Bench.json, its questions about images only; ValueError names a malformed record."""
    return _samples(root, read_records(root / _FILE, "questions"))


def load_from_predictions(answers: AnswerFile) -> BenchmarkData:
    """The truth of an answer file whose rows repeat `answer` and `data_type`."""
    return _samples(answers.files[0].parent, [(row.where, row.values) for row in answers.rows])


def _samples(root: Path, records: list[tuple[str, dict[str, Any]]]) -> BenchmarkData:
    samples = [_read(row, where) for where, row in records if field(row, ("data_type",), where) == "image"]
    twice = [sample for sample in samples if sample.id == _TWICE]
    kept = tuple(sample for sample in samples if not any(sample is one for one in twice[:-1]))
    return BenchmarkData(root, kept, compared=("id", "target"))


def _read(row: dict[str, Any], where: str) -> Sample:
    sample_id = str(field(row, ("question_id",), where))
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
    return _read(row, where)


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """The letter alone, and the forgiving reading."""
    official, lenient = parse_exact_letter(text), parse_letter_lenient(text, sample.choices, number=4)
    return one_right_answer(official, lenient, sample)


def import_predictions(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """LLaVA's rows or a submission; questions about videos are left out: rows that say so, or that the data say so of.

    Of the question that stands twice the last answer counts, as in LLaVA's script.
    """
    path = data.root / _FILE
    records = read_records(path, "questions") if path.is_file() else []
    videos = {str(row.get("question_id")) for _, row in records if row.get("data_type") == "video"}
    twice = [row.values for row in answers.rows if str(row.values.get("question_id")) == _TWICE]

    def leave_out(row: dict[str, Any]) -> str | None:
        if row.get("data_type") == "video" or str(row["question_id"]) in videos:
            return "about videos"
        return "earlier answers to the question that stands twice" if any(row is one for one in twice[:-1]) else None

    return collect(answers, data, (LLAVA, _SUBMISSION), leave_out=leave_out)


BENCHMARK = Benchmark(
    name="seed_bench",
    split="image",
    version="1",
    reference="https://github.com/AILab-CVC/SEED-Bench",
    data_needed="--data-root DIR with DIR/seed_bench/{SEED-Bench.json,SEED-Bench-image/*}; to score an answer file "
    "that holds the truth (answer, data_type), neither",
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
    layouts=(Layout((_FILE,), load, ("SEED-Bench-image/*",)),),
    hub=(
        HubSource(
            repositories=("lmms-lab/SEED-Bench", "lmms-lab-encoder/SEED-Bench"),
            splits=((None, "test"),),
            sample=_from_hub,
            compared=("id", "target"),
        ),
    ),
)
