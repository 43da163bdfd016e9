"""AI2D: which questions get letters, how they are drawn, both layouts, answer files; on hand-written files."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.answer_files import read_answers
from eval.benchmarks.ai2d_letters import Style, draw_letters, has_letters
from eval.registry import get_benchmark
from eval.results import score_samples
from eval.samples import BenchmarkData, Prediction

GREY = (120, 160, 120)
BOX = ((40, 40), (90, 60))
LETTERS = ["A", "B", "C", "D"]
WORDS = ["fox", "grass", "green algae", "hawk"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def question(number: str, choices: Sequence[str], about_letters: bool, answer: int = 1) -> dict[str, Any]:
    truth = {"answerTexts": choices, "correctAnswer": answer}
    return {"abcLabel": about_letters, "questionId": number, **truth}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The folder ai2d-all: images 7 and 30 are in the test split, 8 is not, 9 has no questions."""
    root = tmp_path / "ai2d"
    asked = {
        "Which is food?": question("30.png-0", LETTERS, True),
        "What eats it?": question("30.png-1", WORDS, True, 3),
    }
    write(root / "questions" / "30.png.json", {"imageName": "30.png", "questions": asked})
    asked = {"What is B?": question("7.png-0", WORDS, False)}
    write(root / "questions" / "7.png.json", {"imageName": "7.png", "questions": asked})
    write(root / "questions" / "8.png.json", {"imageName": "8.png", "questions": asked})
    write(root / "ai2d_test_ids.csv", "30\n7\n9\n")
    write(root / "categories.json", {"30.png": "foodWebs"})
    for number in (7, 8, 30):
        text = {"T0": {"rectangle": BOX, "replacementText": "B", "value": "grass"}}
        write(root / "annotations" / f"{number}.png.json", {"text": text})
        (root / "images").mkdir(exist_ok=True)
        Image.new("RGB", (120, 100), GREY).save(root / "images" / f"{number}.png")
    return root


def load(root: Path, name: str = "ai2d") -> BenchmarkData:
    return get_benchmark(name).load(root.parent)


def test_official_folder(official: Path) -> None:
    data = load(official)
    assert [sample.id for sample in data.samples] == ["7.png-0", "30.png-0", "30.png-1"]
    images = [sample.images for sample in data.samples]
    assert images == [("images/7.png",), ("masked/30.png",), ("images/30.png",)]
    assert [sample.target for sample in data.samples] == ["B", "B", "D"]
    assert [sample.cluster for sample in data.samples] == ["7.png", "30.png", "30.png"]
    assert data.samples[1].categories == {"letters": "with letters", "diagram": ("foodWebs",)}
    assert data.samples[0].categories == {"letters": "without letters", "diagram": ()}
    prompt = get_benchmark("ai2d").prompt(data.samples[2])
    lines = ["What eats it?", "A. fox", "B. grass", "C. green algae", "D. hawk"]
    assert prompt.split("\n") == [*lines, "Answer with the option's letter from the given choices directly."]


@pytest.mark.parametrize(("name", "folder"), [("ai2d", "masked"), ("ai2d_no_mask", "no_mask")])
def test_letters_are_drawn_only_where_asked(name: str, folder: str, official: Path) -> None:
    data = load(official, name)
    data.provide_images(image for sample in data.samples for image in sample.images)
    original = official / "images" / "30.png"
    assert (data.image_root / "images" / "30.png").read_bytes() == original.read_bytes()
    drawn = np.asarray(Image.open(data.image_root / folder / "30.png"))
    inside = drawn[43:58, 43:88].reshape(-1, 3)
    if folder == "masked":
        assert not (inside == GREY).all(axis=1).any()  # nothing of the text's place shows through
        assert (inside == 255).any()
        assert inside.min() < 64
    else:
        assert (inside == GREY).all()
        assert (drawn[40, 40:90] == 0).all()
        assert drawn[20:38].min() < 64  # the letter above the frame
    outside = np.concatenate([drawn[:15].reshape(-1, 3), drawn[64:].reshape(-1, 3)])
    assert (outside == GREY).all()


@pytest.mark.parametrize(("colour", "ink"), [("black", 255), ("white", 0)])
def test_letters_without_mask_show_on_dark_and_light(colour: str, ink: int, tmp_path: Path) -> None:
    image = tmp_path / "0.png"
    Image.new("RGB", (120, 100), colour).save(image)
    high = {"rectangle": [[90, 12], [40, 2]], "replacementText": "B"}  # corners in any order; no room above
    annotation = write(tmp_path / "0.png.json", {"text": {"T0": high}})
    drawn = np.asarray(Image.open(io.BytesIO(draw_letters(image, annotation, "no_mask"))))
    assert (drawn[2, 40:90] == ink).all()
    assert (np.abs(drawn[15:30].astype(int) - ink) < 100).any()


def test_letters_without_mask_are_as_high_as_texts_on_average(tmp_path: Path) -> None:
    image = tmp_path / "0.png"
    Image.new("RGB", (200, 200), "white").save(image)
    boxes = {"low": [[10, 26], [60, 36]], "high": [[100, 100], [150, 130]]}  # 10 and 30 pixels: letters have 20
    text = {name: {"rectangle": box, "replacementText": "B"} for name, box in boxes.items()}
    annotation = write(tmp_path / "0.png.json", {"text": text})
    drawn = np.asarray(Image.open(io.BytesIO(draw_letters(image, annotation, "no_mask")))).min(axis=2) < 128
    assert drawn[:25, 10:60].any(), "26 pixels are room enough above the frame"
    assert not drawn[38:90, 10:60].any()


@pytest.mark.parametrize("style", ["masked", "no_mask"])
def test_a_diagram_without_texts_and_a_tiny_box(style: Style, tmp_path: Path) -> None:
    image = tmp_path / "0.png"
    Image.new("RGB", (50, 50), GREY).save(image)
    bare = draw_letters(image, write(tmp_path / "a.json", {"text": {}}), style)
    assert (np.asarray(Image.open(io.BytesIO(bare))) == GREY).all()
    tiny = {"T0": {"rectangle": [[5, 5], [5, 5]], "replacementText": "B"}}
    assert draw_letters(image, write(tmp_path / "a.json", {"text": tiny}), style)


@pytest.mark.parametrize(
    ("asked", "choices", "about_letters", "drawn"),
    [
        ("Which one?", LETTERS, True, True),
        ("Which one?", LETTERS, False, False),
        ("Which one?", WORDS, True, False),
        ("What is B?", WORDS, True, True),
        ("What is (B)?", WORDS, True, True),
        ("Is it a fox?", WORDS, True, True),  # the article is a letter, as in VLMEvalKit
        ("Which one?", ["A and B", "Stage C", "A, B, D", "fox"], True, True),
        ("Which one?", ["A", "B", "fox", "hawk"], True, False),
        ("Which one?", ["A1", "B1", "of", "hawk"], True, True),  # whatever has two characters, as in VLMEvalKit
        ("Which one?", ["A fox", "B fox", "C fox", "D fox"], True, False),
    ],
)
def test_which_questions_have_letters(asked: str, choices: list[str], about_letters: bool, drawn: bool) -> None:
    assert has_letters(asked, choices, about_letters) is drawn


def picture(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def table(root: Path, name: str) -> Path:
    rows = [
        ["700", "What is B?", *WORDS, "B", "lifeCycles", "False", picture("red")],
        ["3000", "Which is food?", *LETTERS, "B", "foodWebs", "True", picture("blue")],
        ["3001", "What eats it?", *WORDS, "D", "foodWebs", "True", "3000"],
    ]
    header = ["index", "question", "A", "B", "C", "D", "answer", "category", "abcLabel", "image"]
    return write(root / name, "".join("\t".join(row) + "\n" for row in [header, *rows]))


@pytest.mark.parametrize(("name", "file"), [("ai2d", "AI2D_TEST.tsv"), ("ai2d_no_mask", "AI2D_TEST_NO_MASK.tsv")])
def test_vlmevalkit_table_holds_the_same_questions(name: str, file: str, official: Path) -> None:
    from_folder = load(official, name)
    table(official, file)
    data = load(official, name)
    assert data.samples[0].images == ("700.png",)
    assert data.fingerprint() == from_folder.fingerprint()
    letters = [sample.categories["letters"] for sample in data.samples]
    assert letters == [sample.categories["letters"] for sample in from_folder.samples]
    assert [sample.cluster for sample in data.samples] == [sample.cluster for sample in from_folder.samples]
    data.provide_images(["700.png", "3001.png"])
    assert Image.open(data.image_root / "700.png").getpixel((0, 0)) == (255, 0, 0)
    assert Image.open(data.image_root / "3001.png").getpixel((0, 0)) == (0, 0, 255)


def test_a_table_that_does_not_tell_which_images_have_letters(official: Path) -> None:
    path = table(official, "AI2D_TEST.tsv")
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    write(path, "".join("\t".join([*row[:8], row[9]]) + "\n" for row in rows))
    assert {sample.categories["letters"] for sample in load(official).samples} == {()}


def test_the_table_of_the_other_version_is_not_taken(tmp_path: Path) -> None:
    table(tmp_path / "ai2d", "AI2D_TEST_NO_MASK.tsv")
    with pytest.raises(FileNotFoundError, match=r"AI2D_TEST\.tsv: no such file"):
        load(tmp_path / "ai2d")


@pytest.mark.parametrize("name", ["ai2d", "ai2d_no_mask"])
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    for root in (None, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"DIR/ai2d/\{ai2d_test_ids\.csv,questions"):
            get_benchmark(name).load(root)


def test_malformed_records_are_named(official: Path) -> None:
    write(official / "annotations" / "30.png.json", {"text": {"T0": {"rectangle": [1, 2], "replacementText": "B"}}})
    with pytest.raises(ValueError, match=r"30\.png\.json, text 'T0': 'rectangle' must hold two corners"):
        load(official).provide_images(["masked/30.png"])
    broken = {"imageName": "7.png", "questions": {"Q?": question("7.png-0", WORDS, True, 4)}}
    write(official / "questions" / "7.png.json", broken)
    with pytest.raises(ValueError, match=r"7\.png\.json, question 'Q\?': expected four 'answerTexts'"):
        load(official)
    write(official / "ai2d_test_ids.csv", "id\n7\n")
    with pytest.raises(ValueError, match=r"ai2d_test_ids\.csv: expected the numbers of images, found 'id'"):
        load(official)


def test_changed_diagrams_are_drawn_again(official: Path) -> None:
    before = load(official)
    Image.new("RGB", (200, 100), GREY).save(official / "images" / "30.png")
    assert load(official).image_root != before.image_root


def test_answers_in_vlmevalkit_and_llava_form(official: Path, tmp_path: Path) -> None:
    data = load(official)
    importer = get_benchmark("ai2d").import_predictions
    assert importer is not None
    rows = "index\tanswer\tprediction\n700\tB\tB. grass\n3000\tB\tThe answer is B.\n3001\tD\t(d)\n"
    found = importer(read_answers(write(tmp_path / "a.tsv", rows)), data).predictions
    scores = [(row["score"], row["score_lenient"]) for row in score_samples(get_benchmark("ai2d"), data.samples, found)]
    assert scores == [(1, 1), (0, 1), (1, 1)]
    with pytest.raises(
        ValueError, match=r"record 1: .*\(index, prediction\)"
    ):  # the truth is never taken for the answer
        importer(read_answers(write(tmp_path / "truth.tsv", "index\tanswer\n700\tB\n")), data)
    llava = [{"question_id": "30.png-1", "text": "D"}, {"question_id": 700, "text": "A"}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in llava))
    assert importer(read_answers(path), data).predictions == {
        "30.png-1": Prediction("30.png-1", "D"),
        "7.png-0": Prediction("7.png-0", "A"),
    }
    with pytest.raises(ValueError, match="record 1: 'index' must be a number, found 'fox'"):
        importer(read_answers(write(tmp_path / "b.jsonl", json.dumps({"question_id": "fox", "text": "A"}))), data)
