"""MMMU on hand-written tables in the layout of the Hub, on the official truth, and on the official answer files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from eval.answer_files import read_answers
from eval.benchmarks.mmmu import SUBJECTS
from eval.registry import get_benchmark
from eval.results import score_samples, write_submission
from eval.samples import BenchmarkData, Prediction

QUESTION = {
    "question": "Who painted <image 1>?",
    "options": "['Ann', \"Bob's\", '<image 2>']",
    "answer": "B",
    "question_type": "multiple-choice",
    "colours": (10, 200),
}
OPEN = {"question": "How many?", "options": "[]", "answer": "['24/7', '3.43']", "question_type": "open"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(colour: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("L", (3, 2), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{colour}.png"}


def write_tables(root: Path, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """A table for each of the 30 subjects, most of them with an open question without pictures."""
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    for subject in SUBJECTS:
        records = []
        for number, row in enumerate(rows.get(subject, [OPEN]), 1):
            shown = [*map(picture, row.get("colours", ())), None, None][:2]
            record = {name: value for name, value in row.items() if name != "colours"}
            records.append(record | {"id": f"validation_{subject}_{number}", "image_1": shown[0], "image_2": shown[1]})
        names = ("id", "question", "options", "answer", "question_type")
        columns = {name: pyarrow.array([record[name] for record in records]) for name in names}
        columns |= {name: pyarrow.array([record[name] for record in records], image) for name in ("image_1", "image_2")}
        folder = root / "mmmu" / subject
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "validation-00000-of-00001.parquet")


def value(data: BenchmarkData, texts: Mapping[str, str], metric: str = "accuracy") -> float:
    benchmark = get_benchmark("mmmu")
    predictions = {name: Prediction(name, text) for name, text in texts.items()}
    rows = score_samples(benchmark, data.samples, predictions)
    return next(each for each in benchmark.metrics if each.name == metric).value(rows)


@pytest.fixture
def data(tmp_path: Path) -> BenchmarkData:
    write_tables(tmp_path, {"Art": [QUESTION, OPEN]})
    return get_benchmark("mmmu").load(tmp_path)


def test_tables_of_the_hub(data: BenchmarkData) -> None:
    assert len(data.samples) == len(SUBJECTS) + 1
    question, free = (sample for sample in data.samples if sample.categories["subject"] == "Art")
    assert question.choices == ("Ann", "Bob's", "<image 2>")
    assert question.categories["domain"] == "Art and Design"
    prompts = [get_benchmark("mmmu").prompt(sample) for sample in (question, free)]
    assert prompts == [
        "Who painted <image 1>?\n\n(A) Ann\n(B) Bob's\n(C) <image 2>\n\n\n"
        "Answer with the option's letter from the given choices directly.",
        "How many?\n\nAnswer the question using a single word or phrase.",
    ]
    assert free.answers == ("24/7", "3.43")
    assert question.images == ("validation_Art_1/image_1.png", "validation_Art_1/image_2.png")
    assert free.images == ()
    data.provide_images(question.images[1:])
    assert Image.open(data.image_root / question.images[1]).getpixel((0, 0)) == 200
    assert not (data.image_root / question.images[0]).exists()


def test_both_readings_and_the_script_s_guesses(data: BenchmarkData) -> None:
    name, free = "validation_Art_1", "validation_Art_2"
    assert value(data, {name: "(B)", free: "about 3.4291"}) == 1
    assert value(data, {name: "b", free: "It is 24/7."}) == 0.5
    assert value(data, {name: "b"}, "accuracy_lenient") == 1
    assert value(data, {name: "b", free: "3"}, "accuracy_with_guesses") == pytest.approx(1 / 6)
    assert value(data, {name: "C"}, "accuracy_with_guesses") == 0


@pytest.mark.parametrize(
    ("text", "official", "lenient"), [("it may be (B), it may be (A)", "A", "A"), ("c.", None, "C")]
)
def test_the_forgiving_reading_adds_to_the_official_one(
    text: str, official: str | None, lenient: str, data: BenchmarkData
) -> None:
    question = next(sample for sample in data.samples if sample.id == "validation_Art_1")
    row = get_benchmark("mmmu").judge(text, question)
    assert (row["parsed"], row["parsed_lenient"]) == (official, lenient)


def test_truth_alone_scores_letters_that_are_read(tmp_path: Path) -> None:
    truth = {
        "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "validation_Math_2": {"question_type": "short-answer", "ground_truth": ["24/7", "3.43"]},
    }
    (tmp_path / "answer_dict_val.json").write_text(json.dumps(truth, indent=4))
    benchmark = get_benchmark("mmmu")
    data = benchmark.load(tmp_path)
    assert value(data, {"validation_Art_1": "B", "validation_Math_2": "3.43 or so"}) == 1
    assert value(data, {"validation_Art_1": ""}) == 0
    for text in ("(B)", "AB"):
        with pytest.raises(
            ValueError, match=r"^validation_Art_1: .* is no letter, and only the tables have the options"
        ):
            value(data, {"validation_Art_1": text})
    assert [sample.images[0].split("/")[0] for sample in data.samples] == ["Art", "Math"]
    (tmp_path / "total_val_output.json").write_text(json.dumps({"validation_Art_1": "B", "validation_Math_2": "x"}))
    assert benchmark.import_predictions is not None
    imported = benchmark.import_predictions(read_answers(tmp_path / "total_val_output.json"), data).predictions
    assert [prediction.text for prediction in imported.values()] == ["B", "x"]


def test_official_and_llava_answer_files(data: BenchmarkData, tmp_path: Path) -> None:
    benchmark = get_benchmark("mmmu")
    texts = {sample.id: "(A) or B" if sample.choices else "so 3.43" for sample in data.samples}
    given = {name: Prediction(name, text) for name, text in texts.items()}
    assert benchmark.import_predictions is not None
    path = write_submission(tmp_path, benchmark, data, given)
    assert path is not None
    written = json.loads(path.read_text())
    assert (written["validation_Art_1"], written["validation_Math_1"]) == ("A", "so 3.43")
    assert benchmark.import_predictions(read_answers(path), data).predictions["validation_Art_1"].text == "A"
    unread = write_submission(tmp_path, benchmark, data, given | {"validation_Art_1": Prediction("", "b")})
    assert unread is not None
    assert json.loads(unread.read_text())["validation_Art_1"] == ""
    official = tmp_path / "output.json"
    official.write_text(json.dumps([{"id": name, "answer": "B", "response": text} for name, text in texts.items()]))
    assert benchmark.import_predictions(read_answers(official), data).predictions == given
    llava = tmp_path / "llava.jsonl"
    llava.write_text("".join(json.dumps({"question_id": name, "text": text}) + "\n" for name, text in texts.items()))
    assert benchmark.import_predictions(read_answers(llava), data).predictions == given
    llava.write_text(json.dumps({"question_id": "validation_Art_1", "text": "A"}))  # one row, not id -> answer
    assert list(benchmark.import_predictions(read_answers(llava), data).predictions) == ["validation_Art_1"]
    official.write_text(json.dumps([{"id": "validation_Art_1", "answer": "B"}]))
    with pytest.raises(ValueError, match=r"record 1: expected the fields of MMMU outputs \(id, response\)"):
        benchmark.import_predictions(read_answers(official), data)
    official.write_text(json.dumps({"validation_Art_9": "B"}))
    with pytest.raises(ValueError, match="'validation_Art_9' is no sample of this benchmark"):
        benchmark.import_predictions(read_answers(official), data)


def test_truth_in_the_official_answer_file(tmp_path: Path) -> None:
    options = {"A": "Ann", "B": "Bob", "C": "Carl", "D": "Dora"}
    text = "it was Bob, I am sure"
    row = {"question_type": "multiple-choice", "answer": "B", "index2ans": options, "response": text}
    path = tmp_path / "output.json"
    path.write_text(json.dumps([{"id": "validation_Art_1", **row}]))
    benchmark = get_benchmark("mmmu")
    assert benchmark.load_from_predictions is not None
    assert value(benchmark.load_from_predictions(read_answers(path)), {"validation_Art_1": text}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "D"}, r"Art/validation, row 1: 'answer' must be the letter of one of 3 options, found 'D'"),
        ({"options": "Ann, Bob"}, "must be the letter of one of 0 options"),
        ({"question_type": "open", "answer": "['24/7'"}, "'answer' must be a text or a list of texts"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    write_tables(tmp_path, {"Art": [QUESTION | change]})
    with pytest.raises(ValueError, match=message):
        get_benchmark("mmmu").load(tmp_path)


def test_missing_tables_are_named(data: BenchmarkData, tmp_path: Path) -> None:
    table = tmp_path / "mmmu" / "Music" / "validation-00000-of-00001.parquet"
    table.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"Music/validation-00000-of-00001\.parquet: damaged"):
        get_benchmark("mmmu").load(tmp_path)
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"Music/validation-\*\.parquet: no such file"):
        get_benchmark("mmmu").load(tmp_path)
    with pytest.raises(FileNotFoundError, match="DIR/mmmu/SUBJECT"):
        get_benchmark("mmmu").load(tmp_path / "mmmu" / "Music")
