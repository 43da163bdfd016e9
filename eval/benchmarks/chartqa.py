"""ChartQA test: questions about charts, 1,250 that people wrote and 1,250 made from summaries by a model.

ChartQA (https://github.com/vis-nlp/ChartQA) has no scorer of its own; the one of the published numbers is
`relaxed_correctness` in `metrics.py` of https://github.com/google-research/pix2struct. The mean of the two parts is the
headline, as in the papers. Papers that remove "%" or "," before they compare gain points: that is `..._lenient` here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from eval.benchmarks.official import field, free_answer, import_by_position, read_records, short_prompt
from eval.hub import HubSource
from eval.layouts import Layout
from eval.measures import Metric, by_label, mean, mean_of, mean_of_labels
from eval.metrics.text import relaxed_accuracy, relaxed_accuracy_lenient
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample

PARTS = ("human", "augmented")
_COMPARED = ("id", "question", "target", "cluster")
_HUMAN = 1250
"""Number of questions that people wrote; the dataset of the Hub has them first."""


def load(root: Path, folder: str) -> BenchmarkData:
    """Read both parts from a folder below `root`; ids are PART_NUMBER, from 0 as in pix2struct, human first.

    Raises:
        ValueError: a malformed record; the message names file and record.
    """
    samples: list[Sample] = []
    for part in PARTS:
        for number, (where, row) in enumerate(read_records(root / folder / f"test_{part}.json")):
            samples.append(_read(row, part, number, f"{folder}/png", where))
    return BenchmarkData(root, tuple(samples), compared=_COMPARED)


def _layout(folder: str) -> Layout:
    files = tuple(f"{folder}/test_{part}.json" for part in PARTS)
    return Layout(files, partial(load, folder=folder), (f"{folder}/png/*.png",))


def _read(row: dict[str, Any], part: str, number: int, folder: str, where: str) -> Sample:
    image = field(row, ("imgname",), where)
    return Sample(
        id=f"{part}_{number}",
        images=(f"{folder}/{image}",),
        question=field(row, ("query",), where),
        target=str(field(row, ("label",), where)),
        cluster=image,
        categories={"part": part},
    )


def _from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    question, label = field(row, ("question",), where), field(row, ("answer",), where)
    part = "human" if number < _HUMAN else "augmented"
    if field(row, ("type",), where) != f"{part}_test":
        raise ValueError(f"{where}: 'type' must be {part}_test in this row, found {row['type']!r}")
    official = {"query": question, "label": label, "imgname": f"row-{number}.png"}
    return _read(official, part, number % _HUMAN, "test/png", where)


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """pix2struct's relaxed accuracy and the forgiving one."""
    score, lenient = (rule(text.strip(), sample.target) for rule in (relaxed_accuracy, relaxed_accuracy_lenient))
    return free_answer(text, score=score, score_lenient=lenient)


def _mean_of_parts(name: str, key: str, primary: bool = False) -> Metric:
    whole = mean_of(name, key)
    return Metric(
        name,
        lambda rows: by_label(rows, whole.summands(rows), "part", PARTS),
        mean_of_labels(mean, len(PARTS)),
        primary=primary,
    )


BENCHMARK = Benchmark(
    name="chartqa",
    split="test",
    version="2022",
    reference="https://github.com/google-research/pix2struct",
    data_needed="--data-root DIR with DIR/chartqa/test/{test_human.json,test_augmented.json,png/*.png} (or all of it "
    "in DIR/chartqa/ChartQA Dataset/test): https://github.com/vis-nlp/ChartQA",
    n_expected=2500,
    fingerprint=None,
    prompt_id="llava15_short",
    prompt=short_prompt,
    max_new_tokens=32,
    parser="pix2struct (relaxed_correctness)",
    judge=judge,
    metrics=(
        _mean_of_parts("relaxed_accuracy", "score", primary=True),
        _mean_of_parts("relaxed_accuracy_lenient", "score_lenient"),
    ),
    breakdowns=("part",),
    layouts=(_layout("test"), _layout("ChartQA Dataset/test")),
    hub=(
        HubSource(
            repositories=("lmms-lab/ChartQA", "lmms-lab-encoder/ChartQA"),
            splits=((None, "test"),),
            sample=_from_hub,
            differs="it does not say which questions share a chart: the intervals take them for independent",
            compared=_COMPARED,
        ),
    ),
    import_predictions=import_by_position,
)
