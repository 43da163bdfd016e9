"""Loaders of the official layouts and readers of answer files, on hand-written files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from eval.answer_files import read_answers
from eval.registry import get_benchmark
from eval.results import score_samples, write_submission
from eval.samples import BenchmarkData, Prediction

SHORT = "\nAnswer the question using a single word or phrase."
TEN = [{"answer": "yes", "answer_id": number} for number in range(1, 11)]


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def predictions(name: str, data: BenchmarkData, rows: list[dict[str, Any]], path: Path) -> dict[str, Prediction]:
    write(path, lines(rows))
    importer = get_benchmark(name).import_predictions
    assert importer is not None
    return importer(read_answers(path), data).predictions


def value(name: str, data: BenchmarkData, answers: dict[str, Prediction], metric: str) -> float:
    benchmark = get_benchmark(name)
    rows = score_samples(benchmark, data.samples, answers)
    return next(each for each in benchmark.metrics if each.name == metric).value(rows)


@pytest.fixture
def pope(tmp_path: Path) -> BenchmarkData:
    for category, count in (("random", 2), ("popular", 1), ("adversarial", 1)):
        rows = [{"question_id": n, "image": f"{n}.jpg", "text": "A?", "label": "yes"} for n in range(1, count + 1)]
        write(tmp_path / "pope" / f"coco_pope_{category}.json", lines(rows))
    return get_benchmark("pope").load(tmp_path)


def test_pope_by_numbers_by_category_and_by_order(pope: BenchmarkData, tmp_path: Path) -> None:
    numbers = [10_000_002, 10_000_001, 20_000_001, 1]
    answers = ["No", "Yes", "Yes", "Yes"]
    llava = [{"question_id": number, "text": text} for number, text in zip(numbers, answers, strict=True)]
    found = predictions("pope", pope, llava, tmp_path / "a.jsonl")
    assert found["random-2"].text == "No"
    assert value("pope", pope, found, "random_recall") == 0.5
    assert value("pope", pope, found, "f1") == pytest.approx((2 / 3 + 1 + 1) / 3)
    names = ["coco_pope_random", "Random", "popular", "adversarial"]
    in_order = [{"category": name, "answer": text} for name, text in zip(names, answers, strict=True)]
    assert predictions("pope", pope, in_order, tmp_path / "b.jsonl")["random-1"].text == "No"
    with pytest.raises(ValueError, match=r"record 1: 'category' must be one of .*'indoor'"):
        predictions("pope", pope, [{"category": "indoor", "text": "No"}], tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="record 1: 'image' is"):
        predictions("pope", pope, [{"question_id": 1, "image": "9.jpg", "text": "No"}], tmp_path / "c.jsonl")


def test_mme_official_folders_and_llava_answers(tmp_path: Path) -> None:
    for category in ("artwork", "landmark", "posters", "celebrity", "scene"):
        folder = tmp_path / "mme" / "MME_Benchmark_release_version" / category
        write(folder / "images" / "1.jpg", "")
        questions = "Is it A?  Please answer yes or no.\tYes\nIs it B? Please answer yes or no.\tNo\n"
        write(folder / "questions_answers_YN" / "1.txt", questions)
    write(tmp_path / "mme" / "MME_Benchmark_release_version" / "OCR" / "1.png", "")
    write(tmp_path / "mme" / "MME_Benchmark_release_version" / "OCR" / "1.txt", questions)
    data = get_benchmark("mme").load(tmp_path)
    assert len(data.samples) == 12
    sample = next(sample for sample in data.samples if sample.cluster == "OCR/1")
    assert (sample.images, sample.question) == (("OCR/1.png",), "Is it A?")
    rows = [
        {"question_id": f"OCR/images/1.{kind}", "prompt": f"<image>\nIs it {name}?{SHORT}", "text": text}
        for kind, name, text in (("png", "A", "yes"), ("png", "B", "No."))
    ]
    assert value("mme", data, predictions("mme", data, rows, tmp_path / "a.jsonl"), "OCR") == 200
    with pytest.raises(ValueError, match="a second prediction"):
        predictions("mme", data, [*rows, rows[0]], tmp_path / "a.jsonl")


def test_scienceqa_prompt_and_image_metric(tmp_path: Path) -> None:
    problem = {"question": "Which?", "choices": ["a\nb", "c"], "answer": 1, "hint": "Look.", "image": "image.png"}
    write(tmp_path / "problems.json", {"1": problem, "2": problem | {"image": None, "hint": ""}})
    write(tmp_path / "pid_splits.json", {"test": ["1", "2"]})
    data = get_benchmark("scienceqa").load(tmp_path)
    prompt = get_benchmark("scienceqa").prompt(data.samples[0])
    assert prompt.startswith("Context: Look.\nWhich?\nA. a\nb\nB. c\nAnswer with the option's letter")
    assert data.samples[0].images == ("images/test/1/image.png",)
    rows = [{"question_id": "1", "text": "B"}, {"question_id": "2", "text": "(B)"}]
    found = predictions("scienceqa", data, rows, tmp_path / "a.jsonl")
    measured = [value("scienceqa", data, found, f"accuracy{suffix}") for suffix in ("", "_img", "_lenient")]
    assert measured == [0.5, 1, 1]


def test_mmbench_rotations(tmp_path: Path) -> None:
    header = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"
    rows = "7\tQ?\tH\tcat\tdog\t\t\tA\tx\t0\n1000007\tQ?\tH\tdog\tcat\t\t\tB\tx\t0\n8\tQ?\t\tcat\tdog\t\t\tB\tx\t0\n"
    write(tmp_path / "mmbench_dev_20230712.tsv", header + rows)
    data = get_benchmark("mmbench").load(tmp_path)
    assert get_benchmark("mmbench").prompt(data.samples[0]).startswith("H\nQ?\nA. cat\nB. dog\nAnswer")
    answers = [
        {"question_id": 7, "text": "A"},
        {"question_id": 1000007, "text": "A"},
        {"question_id": 8, "text": "dog"},
    ]
    found = predictions("mmbench", data, answers, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"record 1: expected the fields of MMBench answer table \(index, pred"):
        predictions("mmbench", data, [{"index": 7, "answer": "A"}], tmp_path / "truth_only.jsonl")
    names = ("circular_accuracy", "first_pass", "all_rotations")
    assert [value("mmbench", data, found, name) for name in names] == pytest.approx([0.5, 1, 2 / 3])


def test_seed_bench_official_file_without_videos(tmp_path: Path) -> None:
    row = {"question": "Q?", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "answer": "B"}
    kinds = [("1", "image"), ("49914", "image"), ("49914", "image"), ("3", "video")]
    questions = [row | {"question_id": number, "data_type": kind, "data_id": "i"} for number, kind in kinds]
    write(tmp_path / "SEED-Bench.json", {"questions": questions})
    data = get_benchmark("seed_bench").load(tmp_path)
    assert [sample.id for sample in data.samples] == ["1", "49914"]
    answers = [{"question_id": number, "prediction": text} for number, text in (("1", "B."), ("49914", "A"))]
    found = predictions(
        "seed_bench", data, [*answers, {"question_id": "49914", "prediction": "B"}], tmp_path / "a.jsonl"
    )
    assert [value("seed_bench", data, found, name) for name in ("accuracy", "accuracy_lenient")] == [0.5, 1]


def test_vqav2_and_its_submission(tmp_path: Path) -> None:
    questions = [{"question_id": number, "image_id": 42, "question": "Is it?"} for number in (1, 2)]
    kinds = {"answer_type": "yes/no", "question_type": "is it"}
    annotations = [{"question_id": number, "answers": TEN, **kinds} for number in (2, 1)]
    folder = tmp_path / "vqav2"
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    data = get_benchmark("vqav2").load(tmp_path)
    assert data.samples[0].images == ("val2014/COCO_val2014_000000000042.jpg",)
    assert data.samples[0].categories == kinds
    assert set(get_benchmark("vqav2").breakdowns) == set(kinds), "both stand in the official result"
    rows = [{"question_id": 1, "answer": "Yes"}, {"question_id": 2, "answer": "yes"}]
    found = predictions("vqav2", data, rows, tmp_path / "a.jsonl")
    assert [value("vqav2", data, found, f"vqa_accuracy{suffix}") for suffix in ("", "_lenient")] == [0.5, 1]

    write(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions[:1]})
    server = get_benchmark("vqav2_test_dev")
    with pytest.raises(FileNotFoundError, match=r"test2015_questions\.json: no such file"):
        server.load(tmp_path)
    write(folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": questions})
    path = write_submission(tmp_path, server, server.load(tmp_path), {"1": Prediction("1", "The Yes.")})
    assert path is not None
    assert json.loads(path.read_text()) == [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": ""}]
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations[:1]})
    with pytest.raises(ValueError, match="other questions than in"):
        get_benchmark("vqav2").load(tmp_path)


def test_textvqa_with_and_without_ocr(tmp_path: Path) -> None:
    row = {"image_id": "abc", "answers": ["nous les gosses"] * 4 + ["x"] * 6}
    rows = [row | {"question_id": 5, "question": "What Title?"}, row | {"question_id": 6, "question": "Who?"}]
    write(tmp_path / "textvqa" / "TextVQA_0.5.1_val.json", {"data": rows})
    ocr = tmp_path / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json"
    write(ocr, {"data": [{"image_id": "abc", "ocr_tokens": ["NOUS", "LES"]}]})
    data = get_benchmark("textvqa").load(tmp_path)
    assert get_benchmark("textvqa").prompt(data.samples[0]) == "What Title?" + SHORT
    with_ocr = get_benchmark("textvqa_ocr").load(tmp_path)
    prompt = get_benchmark("textvqa_ocr").prompt(with_ocr.samples[0])
    assert prompt == "What Title?\nReference OCR token: NOUS, LES" + SHORT
    answers = [{"question_id": "abc", "prompt": prompt, "text": "Nous, les gosses?"}, {"question_id": 6, "text": "x"}]
    assert value("textvqa", data, predictions("textvqa", data, answers, tmp_path / "a.jsonl"), "vqa_accuracy") == 1
    write(ocr, {"data": []})
    with pytest.raises(ValueError, match="no entry for image 'abc'"):
        get_benchmark("textvqa_ocr").load(tmp_path)


def test_vizwiz_and_its_submission(tmp_path: Path) -> None:
    row = {"image": "VizWiz_val_1.jpg", "question": "What does CCR say", "answers": TEN, "answer_type": "other"}
    write(tmp_path / "vizwiz" / "Annotations" / "val.json", [row])
    data = get_benchmark("vizwiz").load(tmp_path)
    assert (
        get_benchmark("vizwiz").prompt(data.samples[0]).startswith("What does CCR say\nWhen the provided information")
    )
    answers = predictions("vizwiz", data, [{"image": "VizWiz_val_1.jpg", "answer": "Yes."}], tmp_path / "a.jsonl")
    assert value("vizwiz", data, answers, "vqa_accuracy") == 1
    write(tmp_path / "vizwiz" / "Annotations" / "test.json", [{"image": "t.jpg", "question": "Q"}])
    server = get_benchmark("vizwiz_test")
    path = write_submission(tmp_path, server, server.load(tmp_path), {"t.jpg": Prediction("t.jpg", "A Dog.")})
    assert path is not None
    assert json.loads(path.read_text()) == [{"image": "t.jpg", "answer": "dog"}]


def test_gqa(tmp_path: Path) -> None:
    row = {"question": "Q?", "imageId": "n1", "answer": "yes", "types": {"structural": "verify"}}
    write(tmp_path / "testdev_balanced_questions.json", {"01": row, "02": row | {"types": {"structural": "query"}}})
    data = get_benchmark("gqa").load(tmp_path)
    assert [sample.categories["kind"] for sample in data.samples] == ["binary", "open"]
    rows = [{"questionId": "01", "prediction": "Yes."}, {"questionId": "02", "prediction": "no"}]
    assert value("gqa", data, predictions("gqa", data, rows, tmp_path / "a.jsonl"), "accuracy") == 0.5


def names_of_metrics(name: str, data: BenchmarkData, texts: dict[str, str]) -> set[str]:
    benchmark = get_benchmark(name)
    rows = score_samples(benchmark, data.samples, {key: Prediction(key, text) for key, text in texts.items()})
    return {metric.name for metric in benchmark.metrics if metric.applies_to(rows)}


def test_gqa_scores_what_the_data_allow(tmp_path: Path) -> None:
    types = {"structural": "query", "semantic": "attr", "detailed": "weather"}
    more = {"types": types, "groups": {"global": "weather"}, "semantic": [{"operation": "select", "argument": "sky"}]}
    row = {"question": "What is it?", "imageId": "n1", "answer": "fog"} | more
    questions = {"01": row | {"entailed": ["02", "01"]}, "02": row | {"entailed": ["99"]}}
    write(tmp_path / "testdev_balanced_questions.json", questions)
    answers = {"01": "Fog.", "02": "rain"}
    data = get_benchmark("gqa").load(tmp_path)
    assert (
        data.samples[0].categories | {"words": "3", "steps": "1", "detailed": "weather"} == data.samples[0].categories
    )
    assert names_of_metrics("gqa", data, answers) == {"accuracy", "accuracy_lenient", "distribution"}
    write(tmp_path / "testdev_balanced_questions.json", {key: row | {"entailed": [key]} for key in questions})
    nothing_entailed = get_benchmark("gqa").load(tmp_path)
    assert "consistency" not in names_of_metrics("gqa", nothing_entailed, answers)

    write(tmp_path / "testdev_balanced_questions.json", questions | {"02": row | {"entailed": []}})
    choices = {key: {"valid": ["fog", "rain"], "plausible": ["fog"]} for key in questions}
    write(tmp_path / "testdev_balanced_choices.json", choices)
    data = get_benchmark("gqa").load(tmp_path)
    predicted = {key: Prediction(key, text) for key, text in answers.items()}
    assert names_of_metrics("gqa", data, answers) >= {"consistency", "validity", "plausibility"}
    found = [
        value("gqa", data, predicted, name) for name in ("consistency", "validity", "plausibility", "distribution")
    ]
    assert found == [0, 1, 0.5, 0.005]
    write(tmp_path / "testdev_balanced_choices.json", {"01": choices["01"]})
    with pytest.raises(ValueError, match=r"choices\.json, question 02: expected the field '02'"):
        get_benchmark("gqa").load(tmp_path)
    write(tmp_path / "testdev_balanced_questions.json", [1])
    with pytest.raises(ValueError, match="expected an object of records"):
        get_benchmark("gqa").load(tmp_path)
    write(tmp_path / "testdev_balanced_questions.json", questions | {"03": "why?"})
    with pytest.raises(ValueError, match=r"questions\.json, '03': expected a JSON object, found 'why\?'"):
        get_benchmark("gqa").load(tmp_path)


def test_vizwiz_answerability(tmp_path: Path) -> None:
    kinds = [("1.jpg", 0), ("2.jpg", 0), ("3.jpg", 1), ("4.jpg", 1)]
    rows = [{"image": image, "question": "Q", "answers": TEN, "answerable": kind} for image, kind in kinds]
    write(tmp_path / "Annotations" / "val.json", rows)
    data = get_benchmark("vizwiz").load(tmp_path)
    texts = dict(zip("1234", ("Unanswerable.", "unsuitable", "the unanswerable", "yes"), strict=True))
    predicted = {f"{key}.jpg": Prediction(f"{key}.jpg", text) for key, text in texts.items()}
    assert value("vizwiz", data, predicted, "unanswerable_f1") == 0.5
    assert value("vizwiz", data, predicted, "unanswerable_average_precision") == pytest.approx(0.5 * 0.5 + 0.5 * 0.5)
    write(
        tmp_path / "Annotations" / "val.json",
        [{key: row[key] for key in ("image", "question", "answers")} for row in rows],
    )
    data = get_benchmark("vizwiz").load(tmp_path)
    found = names_of_metrics("vizwiz", data, {name: one.text for name, one in predicted.items()})
    assert found == {"vqa_accuracy", "vqa_accuracy_lenient"}


@pytest.mark.parametrize(
    "name", ["pope", "mme", "gqa", "vqav2", "okvqa", "textvqa", "textvqa_ocr", "vizwiz", "mmbench"]
)
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    for root in (None, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"DIR/{name.removesuffix('_ocr')}/"):
            get_benchmark(name).load(root)


def test_counts_are_checked_where_no_fingerprint_is_known(tmp_path: Path) -> None:
    test_gqa(tmp_path)
    benchmark = get_benchmark("gqa")
    with pytest.raises(ValueError, match=r"2 samples \(expected 12578\)"):
        benchmark.load_verified(tmp_path)
    dataclasses.replace(benchmark, n_expected=2).load_verified(tmp_path)
