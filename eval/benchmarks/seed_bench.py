"""SEED-Bench-1, questions about images: four options, nine kinds of understanding.

Data: https://github.com/AILab-CVC/SEED-Bench. Its own script ranks the options by likelihood; the published LLaVA numbers come
from generation, and `scripts/convert_seed_for_submission.py` of https://github.com/haotian-liu/LLaVA: the answer must be
the letter and nothing else. One question stands twice in the official files; both count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.benchmarks.official import collect, field, find_folder, letter_prompt, read_answers
from eval.files import read_json
from eval.measures import Style, mean_of
from eval.metrics.multiple_choice import parse_exact_letter, parse_letter_lenient
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Prediction, Sample

_FOUR_DIGITS = Style(digits=4)


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
    ids = _distinct(str(field(row, ("question_id",), place)) for row, place in about_images)
    samples = (_read(row, sample_id, place) for (row, place), sample_id in zip(about_images, ids, strict=True))
    return BenchmarkData(root, tuple(samples), compared=("id", "target"))


def _distinct(numbers: Iterable[str]) -> list[str]:
    """A number met for the second time becomes "number#2"."""
    met: Counter[str] = Counter()
    names = []
    for number in numbers:
        met[number] += 1
        names.append(number if met[number] == 1 else f"{number}#{met[number]}")
    return names


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

    The same answer counts for both copies of the question that stands twice, if the file holds it once.
    """
    known = {sample.id for sample in data.samples}
    rows = [row for row in read_answers(path) if row.get("data_type", "image") == "image"]
    ids = iter(_distinct(str(row.get("question_id")) for row in rows))
    found = collect(path, data, lambda row, where: next(ids), ("text", "prediction"), rows=rows)
    copies = {name for name in known if "#" in name and name not in found and name.split("#")[0] in found}
    return found | {name: Prediction(name, found[name.split("#")[0]].text) for name in copies}


BENCHMARK = Benchmark(
    name="seed_bench",
    split="image",
    version="1",
    reference="https://github.com/AILab-CVC/SEED-Bench",
    data_needed="--data-root DIR with DIR/seed_bench/{SEED-Bench.json,SEED-Bench-image/*}; to score an answer file that "
    "holds the truth (answer, data_type), neither",
    load=load,
    n_expected=14233,
    fingerprint="d45d28fc19240966d6f1bbcf3774561e63f07d0886d5c57ec9fa1b8b73fb2cca",
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
)
