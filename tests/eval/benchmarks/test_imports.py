"""Answers from elsewhere: every format of every benchmark gives the same predictions; what does not match is named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.answer_files import Imported, read_answers
from eval.benchmarks.official import SHORT_SUFFIX
from eval.registry import get_benchmark
from eval.samples import BenchmarkData, Sample
from eval.score import match

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens"
COMMON = {"answer_id": "x", "model_id": "some-7b", "metadata": {}}


def data_of(*samples: Sample, root: Path = Path()) -> BenchmarkData:
    return BenchmarkData(root, samples)


def sample(name: str, question: str = "Is it?", cluster: str = "i", **more: Any) -> Sample:
    return Sample(name, (), question, more.pop("target", "yes"), cluster, **more)


DATA = {
    "easy_vqa": data_of(sample("test-00000"), sample("test-00001", "What color?")),
    "gqa": data_of(sample("01"), sample("02")),
    "mmbench": data_of(*(sample(name, target="B", choices=("x", "y")) for name in ("7", "1000007"))),
    "mme": data_of(
        sample("OCR/1: Is it?", cluster="OCR/1"),
        sample("count/2: Are there two?", "Are there two?", "count/2", target="no"),
    ),
    "okvqa": data_of(sample("1"), sample("2")),
    "pope": data_of(
        *(
            sample(
                f"{name}-{number}",
                f"Is there a {number} in the imange?",
                f"{number}.jpg",
                categories={"category": name},
            )
            for name, count in (("random", 1), ("popular", 2), ("adversarial", 2))
            for number in range(1, count + 1)
        )
    ),
    "scienceqa": data_of(*(sample(name, target="A", choices=("x", "y")) for name in ("4", "11"))),
    "seed_bench": data_of(sample("5", target="A"), sample("49914", target="B")),
    "textvqa": data_of(sample("34602", "What Brand?", "ab"), sample("34603", "Who?", "ab")),
    "vizwiz": data_of(sample("VizWiz_val_00000003.jpg", "What is?"), sample("VizWiz_val_00000012.jpg", "Who?")),
    "vqav2": data_of(sample("1"), sample("2")),
}


def lines(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(dict(row) | COMMON) + "\n" for row in rows)


def table(*rows: Sequence[str], end: str = "\n") -> str:
    return "".join("\t".join(row) + end for row in rows)


def pope_row(category: str, number: int, **row: Any) -> dict[str, Any]:
    return {"category": category, "question": f"Is there a {number} in the image?", **row}


LLAVA: dict[str, tuple[dict[str, Any], str]] = {
    "easy_vqa": ({"question_id": 1, "prompt": "what color?\nShort."}, "test-00001"),
    "gqa": ({"question_id": "02"}, "02"),
    "mmbench": ({"question_id": 1000007, "round_id": 0}, "1000007"),
    "mme": ({"question_id": "OCR/images/1.png", "prompt": f"Is it?{SHORT_SUFFIX}"}, "OCR/1: Is it?"),
    "okvqa": ({"question_id": 2}, "2"),
    "pope": ({"question_id": 20_000_002, "prompt": "Is there a 2 in the image?"}, "popular-2"),
    "scienceqa": ({"question_id": "11"}, "11"),
    "seed_bench": ({"question_id": 5}, "5"),
    "textvqa": ({"question_id": "ab", "prompt": f"who?\nReference OCR token: b{SHORT_SUFFIX}"}, "34603"),
    "vizwiz": ({"question_id": 12, "prompt": "Who?\nWhen"}, "VizWiz_val_00000012.jpg"),
    "vqav2": ({"question_id": 2}, "2"),
}
"""Benchmark -> the row of a LLaVA answer file without its text, and the sample that it is about."""

OFFICIAL: list[tuple[str, str, str, dict[str, str]]] = [
    ("gqa", "a.json", json.dumps([{"questionId": "02", "prediction": "yes"}]), {"02": "yes"}),
    ("mmbench", "a.tsv", "index\tanswer\tprediction\r\n1000007\tB\tA\r\n", {"1000007": "A"}),
    ("mme", "OCR.txt", "1.txt\tIs it?  Please answer yes or no.\tYes\tno\n", {"OCR/1: Is it?": "no"}),
    ("okvqa", "a.json", json.dumps([{"question_id": 2, "answer": "yes"}]), {"2": "yes"}),
    (
        "pope",
        "popular.json",
        lines(*({"question": f"Is there a {at} in the image?", "answer": f"no {at}"} for at in (1, 2))),
        {"popular-1": "no 1", "popular-2": "no 2"},
    ),
    ("scienceqa", "a.json", json.dumps({"results": {"11": 1, "4": -1}}), {"11": "B", "4": ""}),
    ("scienceqa", "a.json", json.dumps({"results": {"11": 1}, "outputs": {"11": "B."}}, indent=1), {"11": "B."}),
    (
        "scienceqa",
        "a.jsonl",
        json.dumps({"correct": [{"question_id": "4", "pred": "A"}], "incorrect": [{"question_id": "11", "pred": "B"}]}),
        {"4": "A", "11": "B"},
    ),
    ("seed_bench", "a.jsonl", lines({"question_id": "5", "prediction": "A"}), {"5": "A"}),
    ("textvqa", "a.json", json.dumps([{"question_id": 34603, "answer": "him"}]), {"34603": "him"}),
    (
        "vizwiz",
        "a.json",
        json.dumps([{"image": "val/VizWiz_val_00000012.jpg", "answer": "a"}]),
        {"VizWiz_val_00000012.jpg": "a"},
    ),
    ("vqav2", "a.json", json.dumps([{"question_id": 2, "answer": "yes"}]), {"2": "yes"}),
]  # fmt: skip


def read(name: str, path: Path, content: str | None = None) -> Imported:
    if content is not None:
        path.write_text(content)
    return match(get_benchmark(name), read_answers(path), DATA[name.removesuffix("_ocr")])


def texts(found: Imported) -> dict[str, str]:
    return {name: prediction.text for name, prediction in found.predictions.items()}


@pytest.mark.parametrize("name", [*LLAVA, "textvqa_ocr"])
def test_llava_answers(name: str, tmp_path: Path) -> None:
    row, sample_id = LLAVA[name.removesuffix("_ocr")]
    found = read(name, tmp_path / "a.jsonl", lines(row | {"text": "red"}))
    assert texts(found) == {sample_id: "red"}
    assert (found.format, found.model) == ("LLaVA answers (question_id, text)", "some-7b")


@pytest.mark.parametrize(("name", "file", "content", "expected"), OFFICIAL)
def test_official_formats(name: str, file: str, content: str, expected: dict[str, str], tmp_path: Path) -> None:
    assert texts(read(name, tmp_path / file, content)) == expected


@pytest.mark.parametrize("name", LLAVA)
def test_rows_that_do_not_match_are_named(name: str, tmp_path: Path) -> None:
    row = LLAVA[name][0]
    unknown = {"question_id": 77, "prompt": "?", "category": "random"}
    refused = {
        "record 2: (a second prediction for|.* no further question)": [row | {"text": "a"}, row | {"text": "b"}],
        "record 1: 'text' must be a string, found None": [row | {"text": None}],
        r"record 1: .*found \['key', 'text'": [{"key": 1, "text": "a"}],
        "record 1: |answers for 'random'": [unknown | {"text": "a"}],
    }
    for message, rows in refused.items():
        with pytest.raises(ValueError, match=message):
            read(name, tmp_path / "a.jsonl", lines(*rows))


@pytest.mark.parametrize("name", LLAVA)
@pytest.mark.parametrize("odd", [None, True, -1, 1.5, 10**30, "", ".", "/", "x" * 10**6, [], {}, [["5"]]])
def test_odd_values_are_one_short_line(name: str, odd: Any, tmp_path: Path) -> None:
    row = LLAVA[name][0] | {"text": "a"}
    for key in row:
        try:
            read(name, tmp_path / "a.jsonl", lines(row | {key: odd}))
        except ValueError as error:
            assert "a.jsonl" in str(error)  # noqa: PT017 - both outcomes are right
            assert "\n" not in str(error)  # noqa: PT017
            assert len(str(error)) < 500  # noqa: PT017


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("easy_vqa", "a.jsonl", lines({"question_id": 0, "prompt": "What color?", "text": "red"}), "asks 'What color"),
        ("vizwiz", "a.jsonl", lines({"question_id": 3, "prompt": "Who?", "text": "red"}), "asks 'Who"),
        ("pope", "a.jsonl", lines({"question_id": 1, "prompt": "Is there a 2?", "text": "no"}), "asks 'Is there a 2"),
        ("pope", "popular.json", lines({"question": "Is there a 1", "answer": "no"}), "1 answers for 'popular', which"),
        ("pope", "a.json", lines({"question": "Is there a 1", "answer": "no"}), "record 1: 'category' must be one of"),
        ("mme", "OCR.txt", "1.txt\tIs it?\tNo\tno\n", "line 1: the truth is 'No' here, but 'yes'"),
        ("mme", "OCR.txt", "1.txt\tIs it?\tYes\tno\tmore\n", "line 1: expected 4 columns .* found 5"),
        ("mmbench", "a.tsv", "index\tanswer\tprediction\n7\tA\tA\n", "record 1: 'answer' is 'A', the data say 'B'"),
        ("mmbench", "a.tsv", "index\tanswer\n7\tB\n", "record 1: expected the fields of MMBench answer table"),
        ("scienceqa", "a.json", '{"results": {"4": 2}}', "question '4': expected the position of a choice"),
        ("scienceqa", "a.json", '{"results": {"4": "A"}}', "question '4': expected the position of a choice"),
        ("scienceqa", "a.json", '{"results": [1]}', "'results' must be an object"),
        ("scienceqa", "a.json", '{"correct": [], "incorrect": [1]}', "'incorrect' must be a list of objects"),
        ("scienceqa", "a.json", '{"results": {}}', "holds no answers"),
    ],
)  # fmt: skip
def test_answers_to_something_else_are_named(name: str, file: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(name, tmp_path / file, content)


def test_pope_in_a_file_for_each_category(tmp_path: Path) -> None:
    for category, count in (("random", 1), ("popular", 2), ("adversarial", 2)):
        rows = ({"question_id": at, "text": f"{category} {at}"} for at in range(1, count + 1))
        (tmp_path / f"coco_pope_{category}_answers.jsonl").write_text(lines(*rows))
    found = read("pope", tmp_path)
    assert {name: text.replace(" ", "-") for name, text in texts(found).items()} == {
        name: name for name in texts(found)
    }
    assert len(found.predictions) == 5


def test_what_is_meant_for_others_is_counted(tmp_path: Path) -> None:
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"questions": [{"question_id": "1", "data_type": "video"}]}))
    rows = [{"question_id": number, "prediction": text} for number, text in ((1, "A"), (49914, "C"), (49914, "B"))]
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    data = BenchmarkData(tmp_path, DATA["seed_bench"].samples)
    found = match(get_benchmark("seed_bench"), read_answers(tmp_path / "a.jsonl"), data)
    assert texts(found) == {"49914": "B"}
    assert list(found.left_out.values()) == [1, 1]
    failed = json.dumps(
        {"correct": [{"question_id": "4", "pred": "A"}], "incorrect": [{"question_id": "11", "pred": "FAILED"}]}
    )
    found = read("scienceqa", tmp_path / "a.jsonl", failed)
    assert (texts(found), found.left_out) == ({"4": "A"}, {"FAILED, without answer": 1})
    tests = {"questions": [{"question_id": number} for number in (1, 2, 3)]}
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").write_text(json.dumps(tests))
    (tmp_path / "a.json").write_text(json.dumps([{"question_id": number, "answer": "a"} for number in (1, 2, 3)]))
    data = BenchmarkData(tmp_path, DATA["vqav2"].samples)
    found = match(get_benchmark("vqav2_test_dev"), read_answers(tmp_path / "a.json"), data)
    assert (list(found.predictions), found.left_out) == (["1", "2"], {"of test2015 outside test-dev": 1})


def golden(name: str) -> tuple[BenchmarkData, list[dict[str, Any]], dict[str, str]]:
    """The data, the rows of the golden predictions, and what they are read as."""
    path = next((GOLDENS / name).glob("predictions.*"))
    benchmark, answers = get_benchmark(name), read_answers(path)
    load = benchmark.load_from_predictions
    data = load(answers) if load is not None else benchmark.load(GOLDENS / name)
    return data, [row.values for row in answers.rows], texts(match(benchmark, answers, data))


def write_golden(name: str, data: BenchmarkData, rows: list[dict[str, Any]], folder: Path) -> None:
    """The golden predictions as the official scorer takes them."""
    if name == "pope":
        for category in ("random", "popular", "adversarial"):
            asked = [sample.question for sample in data.samples if sample.categories["category"] == category]
            answers = [row["text"] for row in rows if row["category"] == category]
            pairs = zip(asked, answers, strict=True)
            (folder / f"{category}.json").write_text(lines(*({"question": q, "answer": a} for q, a in pairs)))
    elif name == "mme":
        truths = {sample.id: sample.target for sample in data.samples}
        for row in rows:
            category, image = row["question_id"].split("/", 1)
            question = row["prompt"].removesuffix(SHORT_SUFFIX)
            truth = truths[f"{category}/{Path(image).stem}: {question}"]
            with (folder / f"{category}.txt").open("a") as file:
                file.write(f"{image}\t{question} Please answer yes or no.\t{truth.title()}\t{row['text']}\n")
    elif name == "seed_bench":
        kept = [
            {"question_id": row["question_id"], "prediction": row["text"]}
            for row in rows
            if row["data_type"] == "image"
        ]
        (folder / "a.jsonl").write_text(lines(*kept))
    elif name == "scienceqa":
        (folder / "a.json").write_text(
            json.dumps({"results": {}, "outputs": {row["question_id"]: row["text"] for row in rows}})
        )
    else:
        (folder / "a.jsonl").write_text(
            lines(*({"question_id": int(row["index"]), "text": row["prediction"]} for row in rows))
        )


@pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"{GOLDENS} is not there")
@pytest.mark.parametrize("name", ["pope", "mme", "mmbench", "scienceqa", "seed_bench"])
def test_goldens_in_another_format_are_the_same_predictions(name: str, tmp_path: Path) -> None:
    data, rows, expected = golden(name)
    write_golden(name, data, rows, tmp_path)
    answers = read_answers(tmp_path)
    assert texts(match(get_benchmark(name), answers, data)) == expected
    assert len(expected) == get_benchmark(name).n_expected
