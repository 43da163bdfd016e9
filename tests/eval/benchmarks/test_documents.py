"""DocVQA, InfographicVQA and ChartQA: official layouts, answer files, submissions and parts, on hand-written files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.answer_files import read_answers
from eval.registry import get_benchmark
from eval.results import build_results, score_samples, write_submission
from eval.samples import BenchmarkData, Prediction

SHORT = "\nAnswer the question using a single word or phrase."


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def imported(name: str, data: BenchmarkData, path: Path, rows: list[dict[str, Any]]) -> dict[str, Prediction]:
    importer = get_benchmark(name).import_predictions
    assert importer is not None
    return importer(read_answers(write(path, rows)), data).predictions


def results(name: str, data: BenchmarkData, answers: dict[str, Prediction]) -> dict[str, Any]:
    rows = score_samples(get_benchmark(name), data.samples, answers)
    return build_results(get_benchmark(name), data, rows, model={}, generation=None, throughput=None)


def values(estimates: dict[str, Any]) -> dict[str, float]:
    return {name: round(estimate["value"], 6) for name, estimate in estimates.items()}


def docvqa_row(number: int, **changes: Any) -> dict[str, Any]:
    page = {"docId": number, "ucsf_document_id": "doc", "image": f"documents/page_{number}.png"}
    asked = {"questionId": number, "question": "Which year?", "answers": ["1995", "in 1995"]}
    return {**asked, **page, "question_types": ["form", "handwritten"], "data_split": "val"} | changes


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("spdocvqa_qas/val_v1.0_withQT.json", "spdocvqa_images"),
        ("val_v1.0_withQT.json", "spdocvqa_images"),
        ("val/val_v1.0.json", "val/documents"),
    ],
)
def test_docvqa_in_each_official_layout(file: str, images: str, tmp_path: Path) -> None:
    rows = [docvqa_row(7), docvqa_row(8, question_types=["form"]), docvqa_row(9, ucsf_document_id="other")]
    write(tmp_path / "docvqa" / file, {"dataset_name": "docvqa", "data": rows})
    data = get_benchmark("docvqa").load(tmp_path)
    sample = data.samples[0]
    assert (sample.id, sample.images, sample.answers) == ("7", (f"{images}/page_7.png",), ("1995", "in 1995"))
    assert [sample.cluster for sample in data.samples] == ["doc", "doc", "other"]
    assert get_benchmark("docvqa").prompt(sample) == "Which year?" + SHORT


def test_docvqa_counts_a_question_under_each_of_its_types(tmp_path: Path) -> None:
    rows = [docvqa_row(7), docvqa_row(8, question_types=["form"]), docvqa_row(9, question_types=[])]
    write(tmp_path / "val_v1.0_withQT.json", {"data": rows})
    data = get_benchmark("docvqa").load(tmp_path)
    answers = [
        {"questionId": 7, "answer": "1995"},
        {"questionId": 8, "answer": '"1995".'},
        {"questionId": 9, "answer": ""},
    ]
    found = results("docvqa", data, imported("docvqa", data, tmp_path / "a.json", answers))
    assert values(found["partial_metrics"]) == {"anls": round((1 + 4 / 7) / 3, 6), "anls_lenient": round(2 / 3, 6)}
    types = found["breakdown"]["question_type"]
    assert {name: group["n"] for name, group in types.items()} == {"form": 2, "handwritten": 1}
    assert values(types) == {"form": round((1 + 4 / 7) / 2, 6), "handwritten": 1}
    assert found["health"]["unparsed"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": None}, "record 1: expected the field 'answers'"),
        ({"answers": []}, "record 1: 'answers' must be a list of at least one text"),
        ({"answers": "1995"}, "record 1: 'answers' must be a list"),
        ({"questionId": "7"}, "record 1: 'questionId' must be a whole number"),
        ({"question_types": "form"}, "record 1: 'question_types' must be a list"),
        ({"image": None}, "record 1: expected the field 'image'"),
    ],
)
def test_malformed_records_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "val_v1.0_withQT.json", {"data": [docvqa_row(7, **changes)]})
    with pytest.raises(ValueError, match=message):
        get_benchmark("docvqa").load(tmp_path)


def test_a_list_for_an_answer_is_refused_as_by_the_server(tmp_path: Path) -> None:
    write(tmp_path / "val_v1.0_withQT.json", {"data": [docvqa_row(7)]})
    data = get_benchmark("docvqa").load(tmp_path)
    with pytest.raises(ValueError, match="record 1: 'answer' must be a string"):
        imported("docvqa", data, tmp_path / "a.json", [{"questionId": 7, "answer": ["1995"]}])


def test_the_threshold_is_kept_and_lengths_are_raw(tmp_path: Path) -> None:
    rows = [docvqa_row(number, answers=["ab  "]) for number in (1, 2)]
    write(tmp_path / "val_v1.0_withQT.json", {"data": rows})
    data = get_benchmark("docvqa").load(tmp_path)
    answers = {"1": Prediction("1", "xy"), "2": Prediction("2", "xyz")}
    scores = [row["score"] for row in score_samples(get_benchmark("docvqa"), data.samples, answers)]
    assert scores == [0.5, 0]


def test_infovqa_types_and_images(tmp_path: Path) -> None:
    row = {"questionId": 5, "question": "How many?", "image_local_name": "20471.jpeg", "answers": ["3"]}
    labels = {"answer_type": ["non span"], "evidence": ["map", "figure"], "operation/reasoning": ["counting"]}
    folder = tmp_path / "infovqa" / "infographicsvqa_qas"
    write(folder / "infographicsVQA_val_v1.0_withQT.json", {"data": [row | labels]})
    data = get_benchmark("infovqa").load(tmp_path)
    assert (data.samples[0].images, data.samples[0].cluster) == (("infographicsvqa_images/20471.jpeg",), "20471.jpeg")
    found = results("infovqa", data, {"5": Prediction("5", "3")})
    groups = {name: list(groups) for name, groups in found["breakdown"].items()}
    assert groups == {"answer_type": ["non span"], "evidence": ["figure", "map"], "operation": ["counting"]}


@pytest.mark.parametrize(
    ("name", "file", "image"),
    [
        ("docvqa", "spdocvqa_qas/test_v1.0.json", {"image": "documents/a.png"}),
        ("infovqa", "infographicsvqa_qas/infographicsVQA_test_v1.0.json", {"image_local_name": "a.jpeg"}),
    ],
)
def test_submissions_to_the_test_server(name: str, file: str, image: dict[str, str], tmp_path: Path) -> None:
    rows = [{"questionId": number, "question": "Q?", **image} for number in (11, 12)]
    write(tmp_path / name / file, {"data": rows})
    server = get_benchmark(f"{name}_test")
    data = server.load(tmp_path)
    answers = {"11": Prediction("11", " Ünit 5 "), "12": Prediction("12", "")}
    path = write_submission(tmp_path, server, data, answers)
    assert path is not None
    assert json.loads(path.read_text()) == [
        {"questionId": 11, "answer": "Ünit 5"},
        {"questionId": 12, "answer": ""},
    ]
    assert imported(f"{name}_test", data, tmp_path / "a.json", json.loads(path.read_text()))["11"].text == "Ünit 5"


@pytest.mark.parametrize("name", ["docvqa", "docvqa_test", "infovqa", "infovqa_test", "chartqa"])
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    for root in (None, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"DIR/{name.removesuffix('_test')}/"):
            get_benchmark(name).load(root)


@pytest.fixture(params=["test", "ChartQA Dataset/test"])
def chartqa(request: pytest.FixtureRequest, tmp_path: Path) -> BenchmarkData:
    human = [{"imgname": "1.png", "query": query, "label": label} for query, label in (("A?", "0.57"), ("B?", "Yes"))]
    machine = [{"imgname": "1.png", "query": "C?", "label": "2014"}]
    write(tmp_path / "chartqa" / request.param / "test_human.json", human)
    write(tmp_path / "chartqa" / request.param / "test_augmented.json", machine)
    data = get_benchmark("chartqa").load(tmp_path)
    assert data.samples[0].images == (f"{request.param}/png/1.png",)
    return data


def test_chartqa_is_the_mean_of_its_parts(chartqa: BenchmarkData, tmp_path: Path) -> None:
    assert [sample.id for sample in chartqa.samples] == ["human_0", "human_1", "augmented_0"]
    assert {sample.cluster for sample in chartqa.samples} == {"1.png"}
    rows = [
        {"question_id": 0, "text": "57%"},
        {"question_id": "human_1", "text": "Yes."},
        {"question_id": 2, "text": "2110"},
    ]
    found = results("chartqa", chartqa, imported("chartqa", chartqa, tmp_path / "a.json", rows))
    assert values(found["partial_metrics"]) == {"relaxed_accuracy": 0.75, "relaxed_accuracy_lenient": 1}
    assert values(found["breakdown"]["part"]) == {"augmented": 1, "human": 0.5}


def test_chartqa_of_one_part_only(chartqa: BenchmarkData) -> None:
    found = results("chartqa", chartqa, {"human_0": Prediction("human_0", "0.6")})
    assert values(found["partial_metrics"])["relaxed_accuracy"] == 0
    found = results("chartqa", chartqa, {"human_0": Prediction("human_0", "0.58")})
    assert values(found["partial_metrics"])["relaxed_accuracy"] == 1


def test_chartqa_answers_in_another_order_are_refused(chartqa: BenchmarkData, tmp_path: Path) -> None:
    row = {"question_id": 0, "prompt": f"<image>\nA?{SHORT}", "text": "0.57"}
    assert imported("chartqa", chartqa, tmp_path / "a.json", [row])["human_0"].text == "0.57"
    with pytest.raises(ValueError, match=r"record 1: asks '<image>.*A.*', but human_1 is 'B"):
        imported("chartqa", chartqa, tmp_path / "a.json", [row | {"question_id": 1}])
    with pytest.raises(ValueError, match="record 1: '3' is no sample"):
        imported("chartqa", chartqa, tmp_path / "a.json", [row | {"question_id": 3}])
