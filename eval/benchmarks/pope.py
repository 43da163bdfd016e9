"""POPE: does the model see objects that are not there? Yes/no questions about 500 COCO images, three samplings.

Official scorer: `evaluate.py` of https://github.com/AoiDragon/POPE; files at its commit e3e39262, which LLaVA-1.5 used
(random: 2,910 questions; today's files have 3,000). LLaVA reports the mean of the three F1.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.answer_files import LLAVA, AnswerFile, AnswerRow, Format, Imported
from eval.benchmarks.official import (
    check_question,
    collect,
    field,
    find_folder,
    judged,
    located,
    recognise,
    short_prompt,
)
from eval.files import read_json_lines, shown
from eval.hub import HubSource
from eval.layouts import Layout
from eval.measures import Metric, Row, Style
from eval.metrics.yes_no import POPE_STATISTICS, parse_pope, parse_yes_no_lenient, pope_counts, pope_f1
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample

CATEGORIES = ("random", "popular", "adversarial")
_FILES = tuple(f"coco_pope_{category}.json" for category in CATEGORIES)
_LLAVA_OFFSETS = {0: "adversarial", 1: "random", 2: "popular"}
_PER_CATEGORY = 10_000_000
_FORMATS = (
    LLAVA,
    Format("POPE answers", "question", "answer"),
    Format("answers in the order of the questions", "category", "answer"),
    Format("answers in the order of the questions", "category", "text"),
)
_SIX_DIGITS = Style(scale=1.0, digits=6, unit="")


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read the three files of questions; ids are category-number in the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a malformed record; the message names file and record.
    """
    root = find_folder("pope", data_root, _FILES, BENCHMARK.data_needed)
    samples: list[Sample] = []
    for category, name in zip(CATEGORIES, _FILES, strict=True):
        for number, (where, row) in enumerate(located(read_json_lines(root / name), root / name), 1):
            samples.append(_read(row, category, number, where))
    return BenchmarkData(root, tuple(samples))


def _read(row: dict[str, Any], category: str, number: int, where: str) -> Sample:
    image, label = field(row, ("image",), where), field(row, ("label",), where)
    if label not in ("yes", "no"):
        raise ValueError(f"{where}: 'label' must be yes or no, found {label!r}")
    question = field(row, ("text",), where)
    return Sample(
        f"{category}-{number}", (f"val2014/{image}",), question, label, image, categories={"category": category}
    )


def _from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    image, answer = field(row, ("image_source",), where), field(row, ("answer",), where)
    official = {
        "image": f"{image.removesuffix('.jpg')}.jpg",
        "label": answer.lower().strip(),
        "text": field(row, ("question",), where),
    }
    return _read(official, field(row, ("category",), where), int(field(row, ("question_id",), where)), where)


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """The official reading, which takes all that is no "no" as "yes", and the forgiving one."""
    official, lenient = parse_pope(text), parse_yes_no_lenient(text)
    return judged(official, lenient, sample)


def import_predictions(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """Rows of LLaVA's answer file, or POPE's own answers (`question`, `answer`), in one file or one for each category.

    LLaVA's `question_id` counts from 1 within a category, plus 10,000,000 or 20,000,000. Where the numbers are not
    those, or there are none, the order within the category counts, as in the official script; then there must be as
    many answers as questions. `category` (`coco_pope_` in front is accepted) may stand in the row or the file's name.
    `image`, `question` and `prompt`, where they are, must be the sample's.
    """
    recognise(answers, _FORMATS)
    by_category: defaultdict[str, list[AnswerRow]] = defaultdict(list)
    for row in answers.rows:
        by_category[_category(row, several=len(answers.files) > 1)].append(row)
    samples = {sample.id: sample for sample in data.samples}
    sizes = Counter(sample.categories["category"] for sample in data.samples)
    ids = {}
    for category, rows in by_category.items():
        for row, place in zip(rows, _places(rows, sizes[category], category, answers.name), strict=True):
            sample = samples[f"{category}-{place}"]
            check_question(row.values.get("question", row.values.get("prompt")), sample, row.where)
            if row.values.get("image", sample.cluster) != sample.cluster:
                image = shown(row.values["image"])
                raise ValueError(f"{row.where}: 'image' is {image}, {sample.id} is about {sample.cluster!r}")
            ids[row.where] = sample.id
    return collect(answers, data, _FORMATS, lambda _, where: ids[where])


def _places(rows: Sequence[AnswerRow], size: int, category: str, name: str) -> list[int]:
    """The place of each row's question within its category, by LLaVA's numbers or by order."""
    numbers = [row.values.get("question_id") for row in rows]
    places = [number % _PER_CATEGORY for number in numbers if isinstance(number, int)]
    if len(places) == len(rows) and all(1 <= place <= size for place in places):
        return places
    if len(rows) != size:
        raise ValueError(
            f"{name}: {len(rows)} answers for {category!r}, which has {size} questions: answers without LLaVA's "
            "numbers (question_id) are matched by their order, so none may be missing"
        )
    return list(range(1, size + 1))


def _category(row: AnswerRow, several: bool) -> str:
    """The category that a row names or, in this order, its file's name among several, its number, its file's name."""
    number = row.values.get("question_id")
    by_number = _LLAVA_OFFSETS.get(number // _PER_CATEGORY) if isinstance(number, int) else None
    in_name = [category for category in CATEGORIES if category in row.file.stem.lower()]
    by_name = in_name[0] if len(in_name) == 1 else None
    named = row.values.get("category") or ((by_name or by_number) if several else (by_number or by_name))
    name = str(named).lower().removeprefix("coco_pope_").removesuffix(".json")
    if name not in CATEGORIES:
        raise ValueError(
            f"{row.where}: 'category' must be one of {', '.join(CATEGORIES)}, found {shown(named)}: it stands in the "
            "row, in LLaVA's question_id or in the name of the file"
        )
    return name


def _counts(key: str) -> Callable[[Sequence[Row]], np.ndarray]:
    """(rows, 15): the five counts of `pope_counts` for each category in turn."""

    def summands(rows: Sequence[Row]) -> np.ndarray:
        counts = pope_counts(rows, key)
        category = np.eye(3)[[CATEGORIES.index(row["categories"]["category"]) for row in rows]]
        return (category[:, :, None] * counts[:, None, :]).reshape(len(rows), 15)

    return summands


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    """The mean of F1 over the categories that have questions."""
    table = sums.reshape(*sums.shape[:-1], 3, 5)
    present = table.sum(axis=-1) > 0
    return np.asarray((pope_f1(table) * present).sum(axis=-1) / present.sum(axis=-1))


def _of_category(place: int, statistic: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """The statistic of one category; not a number where that has no questions."""

    def of_category(sums: np.ndarray) -> np.ndarray:
        counts = sums[..., 5 * place : 5 * place + 5]
        return np.where(counts.sum(axis=-1) > 0, statistic(counts), np.nan)

    return of_category


def _metrics() -> tuple[Metric, ...]:
    metrics = []
    for suffix, key in (("", "parsed"), ("_lenient", "parsed_lenient")):
        metrics.append(Metric(f"f1{suffix}", _counts(key), _mean_f1, primary=not suffix, style=_SIX_DIGITS))
        for place, category in enumerate(CATEGORIES):
            for name, statistic in POPE_STATISTICS.items():
                one = _of_category(place, statistic)
                metrics.append(Metric(f"{category}_{name}{suffix}", _counts(key), one, style=_SIX_DIGITS))
    return tuple(metrics)


BENCHMARK = Benchmark(
    name="pope",
    split="coco",
    version="e3e39262",
    reference="https://github.com/AoiDragon/POPE",
    data_needed="--data-root DIR with DIR/pope/{coco_pope_random.json,coco_pope_popular.json,"
    "coco_pope_adversarial.json,val2014/COCO_val2014_*.jpg}: questions: github.com/AoiDragon/POPE at e3e39262; "
    "images of COCO val2014",
    load=load,
    n_expected=8910,
    fingerprint="dcba9331f1f93969ddfa77082fde81f082e143c21606e51e84dff0ecf8c7e047",
    prompt_id="llava15_short",
    prompt=short_prompt,
    max_new_tokens=16,
    parser="official (llava/eval/eval_pope.py)",
    judge=judge,
    metrics=_metrics(),
    options=lambda _: ("Yes", "No"),
    import_predictions=import_predictions,
    layouts=(Layout(_FILES, ("val2014/COCO_val2014_*.jpg",)),),
    hub=tuple(
        HubSource(
            repositories=("lmms-lab/POPE", "lmms-lab-encoder/POPE"),
            splits=splits,
            sample=_from_hub,
            differs="a later edition, with 3,000 instead of 2,910 random questions",
            counts=(9000,),
        )
        for splits in (((None, "test"),), tuple(("Full", category) for category in CATEGORIES))
    ),
)
