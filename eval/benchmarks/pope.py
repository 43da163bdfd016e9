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

from eval.benchmarks.official import collect, field, find_folder, read_answers, short_prompt
from eval.files import read_json_lines
from eval.hub import HubSource
from eval.measures import Metric, Row, Style
from eval.metrics.yes_no import POPE_STATISTICS, parse_pope, parse_yes_no_lenient, pope_counts, pope_f1
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Prediction, Sample

CATEGORIES = ("random", "popular", "adversarial")
_LLAVA_OFFSETS = {0: "adversarial", 1: "random", 2: "popular"}
_PER_CATEGORY = 10_000_000
_SIX_DIGITS = Style(scale=1.0, digits=6, unit="")


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read the three files of questions; ids are category-number in the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a malformed record; the message names file and record.
    """
    names = [f"coco_pope_{category}.json" for category in CATEGORIES]
    root = find_folder("pope", data_root, names, BENCHMARK.data_needed)
    samples: list[Sample] = []
    for category, name in zip(CATEGORIES, names, strict=True):
        for number, row in enumerate(read_json_lines(root / name), 1):
            where = f"{root / name}, record {number}"
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
    return {
        "parsed": official,
        "parsed_lenient": lenient,
        "score": float(official == sample.target),
        "score_lenient": float(lenient == sample.target),
    }


def import_predictions(path: Path, data: BenchmarkData) -> dict[str, Prediction]:
    """Rows of LLaVA's answer file: `question_id` counts from 1 within a category, plus 10,000,000 or 20,000,000.

    `category` (random, popular, adversarial; `coco_pope_` in front is accepted) may stand beside it. Where the numbers
    are not those, the order within the category counts, as in the official script. An `image` must be the question's.
    """
    rows = read_answers(path)
    sizes = Counter(sample.categories["category"] for sample in data.samples)
    images = {sample.id: sample.cluster for sample in data.samples}
    numbers: defaultdict[str, list[Any]] = defaultdict(list)
    for number, row in enumerate(rows, 1):
        numbers[_category(row, f"{path}, record {number}")].append(row.get("question_id"))
    numbered = {name: all(_in_range(found, sizes[name]) for found in each) for name, each in numbers.items()}
    position: Counter[str] = Counter()

    def find_id(row: dict[str, Any], where: str) -> str:
        category = _category(row, where)
        position[category] += 1
        number = row["question_id"] % _PER_CATEGORY if numbered[category] else position[category]
        sample_id = f"{category}-{number}"
        if row.get("image", images.get(sample_id)) != images.get(sample_id):
            raise ValueError(f"{where}: 'image' is {row['image']!r}, {sample_id} is about {images.get(sample_id)!r}")
        return sample_id

    return collect(path, data, find_id)


def _in_range(number: object, size: int) -> bool:
    return isinstance(number, int) and 1 <= number % _PER_CATEGORY <= size


def _category(row: dict[str, Any], where: str) -> str:
    number = row.get("question_id")
    guessed = _LLAVA_OFFSETS.get(number // _PER_CATEGORY) if isinstance(number, int) else None
    name = str(row.get("category") or guessed).lower().removeprefix("coco_pope_").removesuffix(".json")
    if name not in CATEGORIES:
        raise ValueError(f"{where}: 'category' must be one of {', '.join(CATEGORIES)}, found {row.get('category')!r}")
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
