"""MME: 14 abilities, two yes/no questions about each of 1,187 images; 100 (accuracy + accuracy+) points each.

Official scorer: `calculation.py` of eval_tool.zip,
https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation. Perception (10 abilities) has at
most 2,000 points, cognition (4) at most 800.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from eval.answer_files import LLAVA, AnswerFile, AnswerRow, Format, Imported
from eval.benchmarks.official import SHORT_SUFFIX, collect, field, find_folder, judged, located
from eval.files import read_json_lines, shown
from eval.hub import HubSource
from eval.layouts import Layout
from eval.measures import Metric, Style
from eval.metrics.yes_no import COGNITION, PERCEPTION, mme_points, mme_sums, parse_mme, parse_yes_no_lenient
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample

_INSTRUCTION = "Please answer yes or no."
_TEXTS = Format("MME texts", "image", "answer")
_POINTS = Style(scale=1.0, digits=4, unit="")
_RELEASE = "MME_Benchmark_release_version"


def load(data_root: Path | None = None) -> BenchmarkData:
    """Read the folders of the official release, or ground_truth.jsonl (category, image_stem, question, answer).

    Raises:
        FileNotFoundError: neither is there.
        ValueError: a malformed record; the message names file and record.
    """
    try:
        root = find_folder("mme", data_root, [_RELEASE], BENCHMARK.data_needed) / _RELEASE
    except FileNotFoundError as no_release:
        try:
            root = find_folder("mme", data_root, ["ground_truth.jsonl"], BENCHMARK.data_needed)
        except FileNotFoundError:
            raise no_release from None
        path = root / "ground_truth.jsonl"
        samples = [_from_row(row, where) for where, row in located(read_json_lines(path), path)]
    else:
        samples = [sample for category in (*PERCEPTION, *COGNITION) for sample in _load_category(root, category)]
    return BenchmarkData(root, tuple(samples), compared=("id", "target"))


def _from_row(row: dict[str, Any], where: str) -> Sample:
    category, stem, question, answer = (
        str(field(row, (name,), where)) for name in ("category", "image_stem", "question", "answer")
    )
    return _sample(category, stem, f"{category}/{stem}.jpg", question, answer, where)


def _load_category(root: Path, category: str) -> list[Sample]:
    """A folder with images and texts side by side, or in `images` and `questions_answers_YN`."""
    texts, images = root / category / "questions_answers_YN", root / category / "images"
    if not texts.is_dir():
        texts = images = root / category
    samples = []
    for path in sorted(texts.glob("*.txt")):
        image = next((file for file in sorted(images.glob(f"{path.stem}.*")) if file.suffix != ".txt"), None)
        if image is None:
            raise FileNotFoundError(f"{images / path.stem}.jpg or .png: no such file: {BENCHMARK.data_needed}")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            where = f"{path}, line {number}"
            question, tab, answer = line.partition("\t")
            if not tab:
                raise ValueError(f"{where}: expected a question, a tab and an answer")
            relative = str(image.relative_to(root))
            samples.append(_sample(category, path.stem, relative, question, answer.strip(), where))
    return samples


def _sample(category: str, stem: str, image: str, question: str, answer: str, where: str) -> Sample:
    if category not in (*PERCEPTION, *COGNITION) or answer.lower() not in ("yes", "no"):
        raise ValueError(f"{where}: unknown category {category!r}, or answer {answer!r} that is neither yes nor no")
    bare = _bare(question)
    cluster = f"{category}/{stem}"
    return Sample(f"{cluster}: {bare}", (image,), bare, answer.lower(), cluster, {"category": category})


def _from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    category, image, question, answer = (
        str(field(row, (name,), where)) for name in ("category", "question_id", "question", "answer")
    )
    stem = Path(image).stem
    return _sample(category, stem, f"{category}/{stem}.jpg", question, answer.strip(), where)


def _bare(question: str) -> str:
    """The question without the instruction that LLaVA replaces by its own."""
    return question.replace(_INSTRUCTION, "").strip()


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """The official reading of the first four characters, and the forgiving one; what is neither is wrong."""
    official, lenient = parse_mme(text), parse_yes_no_lenient(text)
    return judged(official, lenient, sample) | {"category": sample.categories["category"], "image": sample.cluster}


def import_predictions(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """LLaVA's answer file, or MME's texts, CATEGORY.txt with the columns image, question, truth and answer.

    LLaVA's `question_id` is category/[images/]image; `prompt` begins with the question.
    """
    if "columns" in answers.rows[0].values:
        answers = answers.with_rows([_from_columns(row) for row in answers.rows])
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in data.samples:
        samples[sample.cluster].append(sample)

    def find_id(row: dict[str, Any], where: str) -> str:
        image = str(row.get("image", row.get("question_id")))
        cluster = f"{image.partition('/')[0]}/{Path(image).stem}"
        prompt = _bare(str(field(row, ("prompt", "question"), where)).removeprefix("<image>\n"))
        asked = [sample for sample in samples[cluster] if prompt.startswith(sample.question)]
        if not asked:
            raise ValueError(f"{where}: the prompt begins with no question about the image {shown(cluster)}")
        sample = max(asked, key=lambda each: len(each.question))
        if row.get("truth", sample.target).lower() != sample.target:
            raise ValueError(f"{where}: the truth is {shown(row['truth'])} here, but {sample.target!r} in the data")
        return sample.id

    return collect(answers, data, (LLAVA, _TEXTS), find_id)


def _from_columns(row: AnswerRow) -> AnswerRow:
    columns = row.values["columns"]
    if len(columns) != 4:
        raise ValueError(
            f"{row.where}: expected 4 columns with tabs between (image, question, truth, answer), found {len(columns)}"
        )
    image, question, truth, answer = columns
    fields = {"image": f"{row.file.stem}/{image}", "question": question, "truth": truth.strip(), "answer": answer}
    return dataclasses.replace(row, values=fields)


def _metrics() -> tuple[Metric, ...]:
    groups = {"perception": PERCEPTION, "cognition": COGNITION} | {name: (name,) for name in (*PERCEPTION, *COGNITION)}
    metrics = []
    for suffix in ("", "_lenient"):
        summands = partial(mme_sums, key=f"score{suffix}")
        for name, members in groups.items():
            primary = name == "perception" and not suffix
            most = 200.0 * len(members)
            metrics.append(Metric(f"{name}{suffix}", summands, mme_points(members), primary, _POINTS, most))
    return tuple(metrics)


BENCHMARK = Benchmark(
    name="mme",
    split="release",
    version="2023-06",
    reference="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
    data_needed=f"--data-root DIR with DIR/mme/{_RELEASE}/CATEGORY/ (images, a text of two questions for each), "
    "asked for at the address below; to score answers without images, DIR/mme/ground_truth.jsonl is enough",
    load=load,
    n_expected=2374,
    fingerprint="d2088c02eacb35b2737cb6571759acfc018ecbbc79e84a7ea4e008bc5e089956",
    prompt_id="llava15_short",
    prompt=lambda sample: sample.question + SHORT_SUFFIX,
    max_new_tokens=16,
    parser="official (calculation.py: first four characters)",
    judge=judge,
    metrics=_metrics(),
    options=lambda _: ("Yes", "No"),
    import_predictions=import_predictions,
    layouts=(
        Layout((_RELEASE,)),
        Layout(("ground_truth.jsonl",), tuple(f"{category}/*.jpg" for category in (*PERCEPTION, *COGNITION))),
    ),
    hub=(
        HubSource(
            repositories=("lmms-lab/MME", "lmms-lab-encoder/MME"),
            splits=((None, "test"),),
            sample=_from_hub,
            compared=("id", "target"),
        ),
    ),
)
