"""NLVR (v1): is a sentence true of a picture of three boxes? Every example is shown in its six orders of the boxes.

Official scorer: `nlvr/metrics_images.py` of https://github.com/lil-lab/nlvr; the public dev split is the one reported.
`nlvr_test` and `nlvr_hidden` are the other two splits with labels (the hidden one is public since 2022). Precision is
over pictures, consistency over sentences: right for every box order of every example of the sentence (up to 24
pictures). No prompt is published; this one asks for one word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from eval.answer_files import LLAVA, AnswerFile, AnswerRow, Format, Imported
from eval.benchmarks.official import collect, field, located, one_right_answer
from eval.files import read_json_lines, shown
from eval.layouts import Layout
from eval.measures import Metric, mean_of
from eval.metrics.multiple_choice import circular_sums
from eval.metrics.text import parse_nlvr, parse_nlvr_lenient
from eval.registry import Benchmark, Submission
from eval.samples import BenchmarkData, Prediction, Sample

ORDERS = 6
"""Pictures of an example: the permutations of its three boxes."""
_LINES = Format("NLVR predictions", "image", "text")
_QUESTION = "\nIs this statement true or false? Answer with a single word."


def load(root: Path, split: str) -> BenchmarkData:
    """Read SPLIT/SPLIT.json; one sample for each PNG, called like it.

    The hidden split does not say in which folder a picture lies: it is looked for, and where there are no pictures
    their place is left open (they are not needed for scoring).

    Raises:
        ValueError: a malformed record; the message names file and record.
    """
    path = root / split / f"{split}.json"
    folders = {image.name: image.parent.name for image in (root / split / "images").glob("*/*.png")}
    samples: list[Sample] = []
    for where, row in located(read_json_lines(path), path):
        samples += _read(row, split, folders, where)
    return BenchmarkData(root, tuple(samples), compared=("id", "question", "target"))


def _read(row: dict[str, Any], split: str, folders: Mapping[str, str], where: str) -> list[Sample]:
    """The samples of one example."""
    identifier, label = field(row, ("identifier",), where), str(field(row, ("label",), where)).lower()
    if label not in ("true", "false"):
        raise ValueError(f"{where}: 'label' must be true or false, found {row['label']!r}")
    sentence = field(row, ("sentence",), where)
    samples = []
    for order in range(ORDERS):
        name = f"{split}-{identifier}-{order}"
        folder = row.get("directory") or folders.get(f"{name}.png", "*")
        samples.append(
            Sample(
                id=name,
                images=(f"{split}/images/{folder}/{name}.png",),
                question=sentence,
                target=label,
                cluster=identifier.split("-")[0],
                categories={"label": label},
            )
        )
    return samples


def prompt(sample: Sample) -> str:
    """The sentence, and the question whether it is true."""
    return sample.question + _QUESTION


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """The official reading of the prediction and the forgiving one; `group` is the sentence."""
    official, lenient = parse_nlvr(text), parse_nlvr_lenient(text)
    return one_right_answer(official, lenient, sample) | {"group": sample.cluster}


def import_predictions(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """The official CSV (lines `PICTURE.png,true`, without header), or rows with `question_id` = picture and `text`."""
    if "columns" in answers.rows[0].values:
        answers = answers.with_rows([_from_columns(row) for row in answers.rows])

    def find_id(row: dict[str, Any], where: str) -> str:
        return str(row.get("image", row.get("question_id"))).split("/")[-1].removesuffix(".png")

    return collect(answers, data, (_LINES, LLAVA), find_id)


def _from_columns(row: AnswerRow) -> AnswerRow:
    """As the official script reads it: what stands between the first and the second comma, blanks before it included.

    Raises:
        ValueError: a line without comma; the message names file and line.
    """
    columns = ",".join(row.values["columns"]).strip().split(",")
    if len(columns) < 2:
        raise ValueError(f"{row.where}: expected PICTURE.png,true or PICTURE.png,false, found {shown(columns[0])}")
    return dataclasses.replace(row, values={"image": columns[0], "text": columns[1]})


def write_submission(data: BenchmarkData, predictions: Mapping[str, Prediction]) -> str:
    """The CSV that the official script scores; an answer that is neither true nor false stands as `unparsed`, wrong."""
    answers = ((sample.id, parse_nlvr(predictions[sample.id].text) or "unparsed") for sample in data.samples)
    return "".join(f"{name}.png,{answer}\n" for name, answer in answers)


def _data_needed(split: str) -> str:
    return (
        f"--data-root DIR with DIR/nlvr/{split}/{{{split}.json,images/N/{split}-*.png}}: the folder `nlvr` of "
        "github.com/lil-lab/nlvr"
    )


def _layout(split: str) -> Layout:
    return Layout((f"{split}/{split}.json",), partial(load, split=split), (f"{split}/images/*/*.png",))


BENCHMARK = Benchmark(
    name="nlvr",
    split="dev",
    version="1.0",
    reference="https://github.com/lil-lab/nlvr",
    data_needed=_data_needed("dev"),
    n_expected=5934,
    fingerprint="a57808067b9edb0d09e77d6460600937947749d3c356be6230927e92961f5af3",
    prompt_id="true_or_false",
    prompt=prompt,
    max_new_tokens=16,
    parser="official (metrics_images.py)",
    judge=judge,
    metrics=(
        mean_of("precision", primary=True),
        Metric("consistency", partial(circular_sums, key="score")),
        mean_of("precision_lenient", "score_lenient"),
        Metric("consistency_lenient", partial(circular_sums, key="score_lenient")),
    ),
    cluster="sentence",
    layouts=(_layout("dev"),),
    breakdowns=("label",),
    options=lambda _: ("True", "False"),
    import_predictions=import_predictions,
    submission=Submission("nlvr_dev_predictions.csv", write_submission),
)


def _other_split(split: str, n_expected: int, fingerprint: str) -> Benchmark:
    return dataclasses.replace(
        BENCHMARK,
        name=f"nlvr_{split}",
        split=split,
        data_needed=_data_needed(split),
        layouts=(_layout(split),),
        shares_folder="nlvr",
        n_expected=n_expected,
        fingerprint=fingerprint,
        submission=Submission(f"nlvr_{split}_predictions.csv", write_submission),
    )


BENCHMARK_TEST = _other_split("test", 5940, "7927734023e79e6d6081b8560da635cfceaaf276d950e3b4382671f1dcb8b7b8")
BENCHMARK_HIDDEN = _other_split("hidden", 5910, "338f57addc8fc14070b3480fd9b421dd663d9f8d856f03c56982e68e969ae4fb")
