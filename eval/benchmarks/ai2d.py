"""AI2D test: multiple choice about diagrams of grade-school science. `ai2d` covers the texts of a diagram by letters
where a question is about letters; `ai2d_no_mask` leaves them readable, which is worth many points: never compare them.

Data: https://prior.allenai.org/projects/diagram-understanding has no letters on its images; the tables of VLMEvalKit
have. Either is read: `AI2D_TEST.tsv` and `AI2D_TEST_NO_MASK.tsv` as published, or the official folder `ai2d-all`, on
whose diagrams the same letters are drawn here (ai2d_letters.py). AI2D has no scorer of its own; the one of
`lmms_eval/tasks/ai2d` of https://github.com/EvolvingLMMs-Lab/lmms-eval counts.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL

from eval.answer_files import LLAVA, AnswerFile, Format, Imported
from eval.benchmarks.ai2d_letters import DRAWING, Style, draw_letters, has_letters
from eval.benchmarks.official import (
    collect,
    field,
    images_of_table,
    letter_prompt,
    located,
    one_right_answer,
    read_table,
)
from eval.files import read_json
from eval.hub import HubSource
from eval.layouts import Layout
from eval.measures import mean_of
from eval.metrics.multiple_choice import LETTERS, parse_letter_lenient, parse_lmms_letter
from eval.registry import Benchmark
from eval.samples import BenchmarkData, Sample
from eval.stored_images import StoredImages, file_identity

_CHOICES = LETTERS[:4]
_COMPARED = ("id", "question", "target", "choices")
_IDS = "ai2d_test_ids.csv"
_OFFICIAL = (_IDS, "questions", "annotations")
_TABLES: Mapping[Style, str] = {"masked": "AI2D_TEST.tsv", "no_mask": "AI2D_TEST_NO_MASK.tsv"}
_QUESTIONS_PER_IMAGE = 100
"""VLMEvalKit's index of a question is number of the image x 100 + number of the question."""


def load_table(root: Path, name: str) -> BenchmarkData:
    """Read a table of VLMEvalKit; ValueError names a malformed record."""
    path = root / name
    samples = tuple(_read_row(row, where) for where, row in located(read_table(path), path))
    images = images_of_table(path.stem.lower(), path)
    return BenchmarkData(root, samples, compared=_COMPARED, stored_images=images)


def load_folder(root: Path, style: Style) -> BenchmarkData:
    """Read the official folder, with images on which letters are drawn; ValueError names a malformed record."""
    samples, images = tuple(_read_folder(root, style)), _drawn_images(root, style)
    return BenchmarkData(root, samples, compared=_COMPARED, stored_images=images)


def _layouts(style: Style) -> tuple[Layout, ...]:
    return (
        Layout((_TABLES[style],), partial(load_table, name=_TABLES[style])),
        Layout(_OFFICIAL, partial(load_folder, style=style), ("images/*.png",)),
    )


def _read_row(row: dict[str, Any], where: str) -> Sample:
    index, answer = field(row, ("index",), where), field(row, ("answer",), where)
    if answer not in tuple(_CHOICES):
        raise ValueError(f"{where}: 'answer' must be one of A, B, C, D, found {answer!r}")
    return _sample(
        identifier=_from_index(index, where),
        image=f"{index}.png",
        question=field(row, ("question",), where),
        choices=tuple(field(row, (letter,), where) for letter in _CHOICES),
        answer=_CHOICES.index(answer),
        diagram=row.get("category"),
        about_letters=str(row["abcLabel"]).lower() in ("true", "1", "1.0") if "abcLabel" in row else None,
    )


def _from_index(index: Any, where: str) -> str:
    try:
        image, question = divmod(int(float(index)), _QUESTIONS_PER_IMAGE)
    except ValueError as error:
        raise ValueError(f"{where}: 'index' must be a number, found {index!r}") from error
    return f"{image}.png-{question}"


def _read_folder(root: Path, style: Style) -> Iterator[Sample]:
    """The questions about the images of the test split, in the order of their numbers."""
    kinds = read_json(root / "categories.json") if (root / "categories.json").is_file() else {}
    for path in _test_files(root, "questions"):
        content = read_json(path)
        image = str(field(content, ("imageName",), str(path)))
        for text, row in field(content, ("questions",), str(path)).items():
            where = f"{path}, question {text!r}"
            choices, answer = field(row, ("answerTexts",), where), field(row, ("correctAnswer",), where)
            if not isinstance(choices, list) or len(choices) != len(_CHOICES) or answer not in range(len(_CHOICES)):
                raise ValueError(f"{where}: expected four 'answerTexts' and the position of one as 'correctAnswer'")
            sample = _sample(
                identifier=field(row, ("questionId",), where),
                image=f"images/{image}",
                question=text,
                choices=tuple(map(str, choices)),
                answer=answer,
                diagram=kinds.get(image),
                about_letters=bool(field(row, ("abcLabel",), where)),
            )
            with_letters = sample.categories["letters"] == "with letters"
            yield dataclasses.replace(sample, images=(f"{style}/{image}",)) if with_letters else sample


def _test_files(root: Path, folder: str) -> list[Path]:
    """The files of the test split's images in `questions` or `annotations`; not every image has questions."""
    with (root / _IDS).open(encoding="utf-8-sig", newline="") as file:
        numbers = [row[0].strip() for row in csv.reader(file) if row and row[0].strip()]
    odd = next((number for number in numbers if not number.isdecimal()), None)
    if odd is not None:
        raise ValueError(f"{root / _IDS}: expected the numbers of images, found {odd!r}")
    paths = [root / folder / f"{number}.png.json" for number in sorted(set(numbers), key=int)]
    return [path for path in paths if path.is_file()]


def _drawn_images(root: Path, style: Style) -> StoredImages:
    pictures = [root / "images" / path.name.removesuffix(".json") for path in _test_files(root, "questions")]
    files = [path for path in [*pictures, *_test_files(root, "annotations")] if path.is_file()]
    origin = [DRAWING, PIL.__version__, [file_identity(path) for path in files]]
    return StoredImages.in_cache("ai2d_drawn", origin, partial(_draw, root))


def _draw(root: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        folder, image = name.split("/")
        path = root / "images" / image
        if folder == "images":
            yield name, path.read_bytes()
        else:
            yield (
                name,
                draw_letters(
                    path, root / "annotations" / f"{image}.json", "masked" if folder == "masked" else "no_mask"
                ),
            )


def _sample(
    identifier: str,
    image: str,
    question: str,
    choices: tuple[str, ...],
    answer: int,
    diagram: str | None,
    about_letters: bool | None,
) -> Sample:
    """A sample; `about_letters` is None where the data do not tell."""
    letters: str | tuple[str, ...] = ()
    if about_letters is not None:
        letters = "with letters" if has_letters(question, choices, about_letters) else "without letters"
    return Sample(
        id=identifier,
        images=(image,),
        question=question,
        target=_CHOICES[answer],
        cluster=identifier.rpartition("-")[0],
        categories={"letters": letters, "diagram": (diagram,) if diagram else ()},
        choices=choices,
    )


def _from_hub(row: dict[str, Any], number: int, where: str) -> Sample:
    choices, answer = tuple(map(str, field(row, ("options",), where))), field(row, ("answer",), where)
    if len(choices) != len(_CHOICES) or str(answer) not in ("0", "1", "2", "3"):
        raise ValueError(f"{where}: expected four 'options' and the position of one as 'answer', found {answer!r}")
    return Sample(
        id=f"row-{number}",
        images=(f"row-{number}.png",),
        question=field(row, ("question",), where),
        target=_CHOICES[int(answer)],
        cluster=f"row-{number}",
        categories={"letters": (), "diagram": ()},
        choices=choices,
    )


def _hub(*repositories: str) -> HubSource:
    return HubSource(
        repositories=repositories,
        splits=((None, "test"),),
        sample=_from_hub,
        differs="it gives no numbers (identifiers are row-NUMBER, not the official ones), nor which questions share a "
        "diagram: the intervals take them for independent",
        compared=_COMPARED,
    )


def judge(text: str, sample: Sample) -> dict[str, Any]:
    """lmms-eval's reading and the forgiving one; a letter beyond the options is wrong."""
    official, lenient = parse_lmms_letter(text), parse_letter_lenient(text, sample.choices)
    return one_right_answer(official, lenient, sample)


def import_predictions(answers: AnswerFile, data: BenchmarkData) -> Imported:
    """VLMEvalKit's table (`index`, `prediction`), or LLaVA's rows (`question_id` such as "0.png-0", or an index)."""

    def find_id(row: dict[str, Any], where: str) -> str:
        key = str(field(row, ("index", "question_id"), where))
        return key if ".png-" in key else _from_index(key, where)

    return collect(answers, data, (Format("VLMEvalKit's table", "index", "prediction"), LLAVA), find_id)


def _data_needed(style: Style) -> str:
    return (
        f"--data-root DIR with DIR/ai2d/{_TABLES[style]} of VLMEvalKit, which holds the images too; or the official "
        f"DIR/ai2d/{{{_IDS},questions/*.json,annotations/*.json,images/*.png}} and, for the breakdown by kind of "
        "diagram, categories.json: https://prior.allenai.org/projects/diagram-understanding (letters are drawn here)"
    )


BENCHMARK = Benchmark(
    name="ai2d",
    split="test",
    version="letters masked",
    reference="https://github.com/EvolvingLMMs-Lab/lmms-eval",
    data_needed=_data_needed("masked"),
    n_expected=3088,
    fingerprint=None,
    prompt_id="llava15_letter",
    prompt=letter_prompt,
    max_new_tokens=16,
    parser="lmms-eval (tasks/ai2d/utils.py)",
    judge=judge,
    metrics=(mean_of("accuracy", primary=True), mean_of("accuracy_lenient", "score_lenient")),
    breakdowns=("letters", "diagram"),
    layouts=_layouts("masked"),
    hub=(_hub("lmms-lab/ai2d", "lmms-lab-encoder/ai2d"),),
    import_predictions=import_predictions,
)

BENCHMARK_NO_MASK = dataclasses.replace(
    BENCHMARK,
    name="ai2d_no_mask",
    version="letters beside readable texts",
    data_needed=_data_needed("no_mask"),
    layouts=_layouts("no_mask"),
    shares_folder="ai2d",
    hub=(_hub("lmms-lab/ai2d-no-mask", "lmms-lab-encoder/ai2d-no-mask", "Efficient-Large-Model/ai2d-no-mask"),),
)
