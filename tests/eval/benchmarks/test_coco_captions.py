"""COCO captions on hand-written files in the official layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from eval.answer_files import read_answers
from eval.harnesses.lmms_tasks import aggregate, process_results, write_task
from eval.metrics.captions import cider
from eval.registry import Benchmark, get_benchmark
from eval.results import build_results, score_samples, summary, write_submission
from eval.samples import BenchmarkData, Prediction

CAPTIONS = {7: ["a red dog runs on grass", "the dog runs"], 9: ["plan b."], 4: ["A man eats cake"], 5: ["a train"]}
SPLITS = {4: "test", 7: "test", 9: "test", 5: "restval"}
ORDER = (7, 9, 5, 4)


def write_files(root: Path) -> None:
    folder = root / "coco_captions"
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    images = [
        {"cocoid": name, "split": split, "filepath": "val2014", "filename": f"COCO_val2014_{name:012}.jpg"}
        for name, split in SPLITS.items()
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    annotations = [{"image_id": name, "caption": text} for name, texts in CAPTIONS.items() for text in texts]
    content = {"images": [{"id": name} for name in ORDER], "annotations": annotations}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))


@pytest.fixture
def data(tmp_path: Path) -> BenchmarkData:
    write_files(tmp_path)
    return get_benchmark("coco_captions").load(tmp_path)


@pytest.fixture
def benchmark() -> Benchmark:
    return dataclasses.replace(get_benchmark("coco_captions"), n_expected=3)


ANSWERS = {
    "7": Prediction("7", "A red dog runs."),
    "9": Prediction("9", "plan b"),
    "4": Prediction("4", "a man eats cake\nHe likes it."),
}


def test_test_images_in_the_order_of_the_captions(data: BenchmarkData, benchmark: Benchmark) -> None:
    assert [sample.id for sample in data.samples] == ["7", "9", "4"]
    assert data.samples[0].answers == ("a red dog runs on grass", "the dog runs")
    assert data.samples[0].images == ("val2014/COCO_val2014_000000000007.jpg",)
    assert benchmark.prompt(data.samples[0]) == "Provide a one-sentence caption for the provided image."


def test_cider_of_all_and_of_first_lines(data: BenchmarkData, benchmark: Benchmark) -> None:
    rows = score_samples(benchmark, data.samples, ANSWERS)
    references = {sample.id: sample.answers for sample in data.samples}
    values = {metric.name: metric.value(rows) for metric in benchmark.metrics}
    assert values["cider"] == pytest.approx(cider({name: one.text for name, one in ANSWERS.items()}, references))
    first_lines = {name: one.text.split("\n")[0] for name, one in ANSWERS.items()}
    assert values["cider_lenient"] == pytest.approx(cider(first_lines, references))
    assert values["cider_lenient"] > values["cider"] > 0
    # "plan b." before "A man" is "plan b": both 1- and 2-grams agree, there are no longer ones.
    assert rows[1]["score"] == pytest.approx(0.5)


def test_a_part_has_other_frequencies_and_no_headline_number(data: BenchmarkData, benchmark: Benchmark) -> None:
    whole, part = (score_samples(benchmark, data.samples[:n], ANSWERS) for n in (3, 2))
    assert whole[0]["cider"] != pytest.approx(part[0]["cider"])
    results = build_results(benchmark, data, part, model={"name": None}, generation=None, throughput=None, limit=2)
    assert (results["partial"], results["metrics"]) == (True, {})
    assert summary(results).split("\n")[0] == "coco_captions karpathy_test: partial 2/3: no headline number"
    assert score_samples(benchmark, data.samples, {}) == []


def test_the_interval_of_full_marks_ends_at_ten(data: BenchmarkData, benchmark: Benchmark) -> None:
    perfect = {sample.id: Prediction(sample.id, "a b c d e") for sample in data.samples}
    rows = [row | {"cider": 10.0, "cider_lenient": 0.0} for row in score_samples(benchmark, data.samples, perfect)]
    metrics = build_results(benchmark, data, rows, model={"name": None}, generation=None, throughput=None)["metrics"]
    low, high = metrics["cider"]["ci95"]
    assert 3 < low < high == 10
    assert metrics["cider_lenient"]["ci95"][1] < 7


def test_results_in_and_out(data: BenchmarkData, benchmark: Benchmark, tmp_path: Path) -> None:
    path = write_submission(tmp_path, benchmark, data, ANSWERS)
    assert path is not None
    assert json.loads(path.read_text())[0] == {"image_id": 7, "caption": "A red dog runs."}
    assert benchmark.import_predictions is not None
    assert benchmark.import_predictions(read_answers(path), data).predictions == ANSWERS
    llava = tmp_path / "llava.jsonl"
    llava.write_text("".join(json.dumps({"question_id": n, "text": one.text}) + "\n" for n, one in ANSWERS.items()))
    assert benchmark.import_predictions(read_answers(llava), data).predictions == ANSWERS


def test_lmms_eval_gets_the_cider_of_all(
    data: BenchmarkData, benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data.root / "val2014").mkdir()
    for sample in data.samples:
        (data.root / sample.images[0]).write_bytes(b"")
    task = write_task(benchmark, data, tmp_path)
    rows = [json.loads(line) for line in task.with_suffix(".jsonl").read_text().splitlines()]
    scored = [process_results(row, [ANSWERS[row["id"]].text])["cider"] for row in rows]
    expected = [row["cider"] for row in score_samples(benchmark, data.samples, ANSWERS)]
    assert aggregate(scored) == pytest.approx(sum(expected) / 3)


def test_missing_captions_are_named(tmp_path: Path) -> None:
    write_files(tmp_path)
    path = tmp_path / "coco_captions" / "annotations" / "captions_val2014.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][:2]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no caption of image 4, which dataset_coco\.json has in its test split"):
        get_benchmark("coco_captions").load(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected an object with a list 'annotations'"):
        get_benchmark("coco_captions").load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"DIR/coco_captions/\{dataset_coco\.json"):
        get_benchmark("coco_captions").load(tmp_path)
