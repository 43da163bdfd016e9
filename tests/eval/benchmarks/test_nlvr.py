"""NLVR on hand-written files in the official layout: pictures, the CSV, both scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.answer_files import read_answers
from eval.registry import get_benchmark
from eval.results import score_samples, write_submission
from eval.samples import BenchmarkData, Prediction

EXAMPLES = [
    {"sentence": "There is a tower.", "label": "true", "identifier": "7-0", "directory": "2"},
    {"sentence": "There is a tower.", "label": "false", "identifier": "7-3", "directory": "2"},
    {"sentence": "No box is empty", "label": "false", "identifier": "70-0", "directory": "0"},
]
ORDERS = 6


def write_split(root: Path, split: str, examples: list[dict[str, str]]) -> None:
    folder = root / "nlvr" / split
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text("".join(json.dumps(example) + "\n" for example in examples))


@pytest.fixture
def data(tmp_path: Path) -> BenchmarkData:
    write_split(tmp_path, "dev", EXAMPLES)
    return get_benchmark("nlvr").load(tmp_path)


def values(data: BenchmarkData, predictions: dict[str, Prediction]) -> dict[str, float]:
    benchmark = get_benchmark("nlvr")
    rows = score_samples(benchmark, data.samples, predictions)
    return {metric.name: metric.value(rows) for metric in benchmark.metrics}


def predict(data: BenchmarkData, **changed: str) -> dict[str, Prediction]:
    texts = {sample.id: sample.target for sample in data.samples}
    texts |= {name.replace("_", "-"): text for name, text in changed.items()}
    return {name: Prediction(name, text) for name, text in texts.items()}


def test_one_sample_for_each_order_of_the_boxes(data: BenchmarkData) -> None:
    assert len(data.samples) == len(EXAMPLES) * ORDERS
    first = data.samples[0]
    assert (first.id, first.images) == ("dev-7-0-0", ("dev/images/2/dev-7-0-0.png",))
    prompt = get_benchmark("nlvr").prompt(first)
    assert prompt == "There is a tower.\nIs this statement true or false? Answer with a single word."
    assert {sample.cluster for sample in data.samples} == {"7", "70"}


def test_one_wrong_order_spoils_the_sentence_but_not_its_namesake(data: BenchmarkData) -> None:
    found = values(data, predict(data, dev_7_3_5="True"))
    assert (found["precision"], found["consistency"]) == (17 / 18, 1 / 2)
    assert values(data, predict(data)) == dict.fromkeys(found, 1)


def test_words_that_the_script_does_not_read(data: BenchmarkData) -> None:
    found = values(data, predict(data, dev_7_0_0="TRUE", dev_7_0_1="true, it is", dev_7_0_2="True.", dev_7_0_3="Yes"))
    assert (found["precision"], found["consistency"]) == (16 / 18, 1 / 2)
    assert (found["precision_lenient"], found["consistency_lenient"]) == (1, 1)


def test_csv_and_llava_rows(data: BenchmarkData, tmp_path: Path) -> None:
    benchmark = get_benchmark("nlvr")
    given = predict(data, dev_7_0_0="I see a tower, true", dev_70_0_1="TRUE")
    path = write_submission(tmp_path, benchmark, data, given)
    assert path is not None
    assert path.read_text().splitlines()[:2] == ["dev-7-0-0.png,unparsed", "dev-7-0-1.png,true"]
    assert benchmark.import_predictions is not None
    imported = benchmark.import_predictions(read_answers(path), data).predictions
    official = ("precision", "consistency")
    assert [values(data, imported)[name] for name in official] == [values(data, given)[name] for name in official]
    rows = [{"question_id": f"dev/images/2/{name}.png", "text": one.text} for name, one in given.items()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert benchmark.import_predictions(read_answers(tmp_path / "a.jsonl"), data).predictions == given
    path.write_text("dev-7-0-0.png,true,false\n")
    assert benchmark.import_predictions(read_answers(path), data).predictions["dev-7-0-0"].text == "true"
    path.write_text("dev-7-0-0.png\n")
    with pytest.raises(ValueError, match=r"line 1: expected PICTURE\.png,true"):
        benchmark.import_predictions(read_answers(path), data)
    path.write_text("dev-7-0-0.png, true\ndev-7-0-0.png,true\n")
    with pytest.raises(ValueError, match="line 2: a second prediction for 'dev-7-0-0'"):
        benchmark.import_predictions(read_answers(path), data)


def test_hidden_pictures_are_found_where_they_lie(tmp_path: Path) -> None:
    examples = [{name: text for name, text in EXAMPLES[0].items() if name != "directory"}]
    write_split(tmp_path, "hidden", examples)
    images = tmp_path / "nlvr" / "hidden" / "images" / "3"
    benchmark = get_benchmark("nlvr_hidden")
    assert benchmark.load(tmp_path).samples[1].images == ("hidden/images/*/hidden-7-0-1.png",)
    images.mkdir(parents=True)
    (images / "hidden-7-0-1.png").write_bytes(b"")
    assert benchmark.load(tmp_path).samples[1].images == ("hidden/images/3/hidden-7-0-1.png",)


def test_bad_label_is_named(tmp_path: Path) -> None:
    write_split(tmp_path, "test", [EXAMPLES[0] | {"label": "maybe"}])
    with pytest.raises(ValueError, match=r"test\.json, record 1: 'label' must be true or false, found 'maybe'"):
        get_benchmark("nlvr_test").load(tmp_path)
