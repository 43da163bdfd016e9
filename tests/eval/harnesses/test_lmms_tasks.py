"""Our benchmarks as tasks of lmms-eval: their files, and scores equal to our own. lmms-eval is not needed."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import yaml

from eval.harnesses import lmms_tasks
from eval.harnesses.lmms_tasks import aggregate, doc_to_visual, process_results, write_task
from eval.registry import Benchmark, get_benchmark
from eval.results import score_samples
from eval.samples import BenchmarkData, Prediction, Sample


class Loader(yaml.SafeLoader):
    """Reads `!function` as the name that stands behind it, as lmms-eval does when it lists tasks."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_task_asks_what_the_benchmark_asks(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    data = benchmark.load(data_root)
    path = write_task(benchmark, data, tmp_path / "tasks")
    task = yaml.load(path.read_text(encoding="utf-8"), Loader)
    assert task["task"] == path.stem == "easy_vqa_local"
    assert task["dataset_kwargs"] == {"data_files": {"test": "easy_vqa_local.jsonl"}}
    assert task["generation_kwargs"]["max_new_tokens"] == benchmark.max_new_tokens
    assert [metric["metric"] for metric in task["metric_list"]] == [metric.name for metric in benchmark.metrics]
    functions = {task["doc_to_visual"], task["process_results"], *(m["aggregation"] for m in task["metric_list"])}
    for function in functions:
        module, _, name = function.rpartition(".")
        assert module == "eval.harnesses.lmms_tasks"
        assert callable(getattr(lmms_tasks, name))
    rows = rows_of(path)
    assert [(row["id"], row["prompt"]) for row in rows] == [(s.id, benchmark.prompt(s)) for s in data.samples]
    (picture,) = doc_to_visual(rows[7])
    assert (picture.mode, picture.size) == ("RGB", (64, 64))


def test_scores_are_those_of_our_own_rows(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    data = benchmark.load(data_root)
    rows = rows_of(write_task(benchmark, data, tmp_path))
    answers = [("yes", "Red.", "circle", "no")[number % 4] for number in range(len(rows))]
    results = [process_results(row, [answer]) for row, answer in zip(rows, answers, strict=True)]
    assert [(r["id"], r["text"]) for r in results] == list(zip((s.id for s in data.samples), answers, strict=True))
    predictions = {s.id: Prediction(s.id, answer) for s, answer in zip(data.samples, answers, strict=True)}
    ours = score_samples(benchmark, data.samples, predictions)
    assert len({metric.value(ours) for metric in benchmark.metrics}) == len(benchmark.metrics)
    for metric in benchmark.metrics:
        sent = pickle.loads(pickle.dumps([result[metric.name] for result in results]))  # as between processes
        assert 0 < metric.value(ours) < 1
        assert aggregate(sent) == metric.value(ours)


def test_metrics_that_the_data_do_not_allow_are_left_out(tmp_path: Path) -> None:
    benchmark = get_benchmark("gqa")
    categories = {"detailed": "", "kind": "open"}
    samples = [Sample(name, (), "what?", "dog", name, categories, details={"group": "animal"}) for name in "ab"]
    path = write_task(benchmark, BenchmarkData(tmp_path, tuple(samples)), tmp_path / "tasks")
    listed = yaml.load(path.read_text(encoding="utf-8"), Loader)["metric_list"]
    metrics = [each["metric"] for each in listed]
    assert metrics == ["accuracy", "accuracy_lenient", "distribution"]
    assert [each["higher_is_better"] for each in listed] == [True, True, False]
    results = [process_results(row, [answer]) for row, answer in zip(rows_of(path), ("dog", "cat"), strict=True)]
    assert [aggregate([result[name] for result in results]) for name in metrics] == [0.5, 0.5, 0.005]
    assert set(results[0]) == {"id", "text", *metrics}


def test_a_sample_with_many_fields_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = get_benchmark("textvqa")
    fields = {"answers": ("a", "b") * 5, "details": {"ocr_tokens": ["a", "é"]}, "categories": {"kind": "x"}}
    sample = Sample("1", (), "what?", "a", "image", **fields)
    data = BenchmarkData(tmp_path, (sample,))
    (row,) = rows_of(write_task(benchmark, data, tmp_path / "tasks"))
    assert doc_to_visual(row) == []
    assert process_results(row, ["a"])[benchmark.primary_metric]["score"] == 1
    odd = BenchmarkData(tmp_path, (dataclasses.replace(sample, details={"pair": (1, 2)}),))
    with pytest.raises(ValueError, match=r"^textvqa: sample '1' holds values that JSON does not keep$"):
        write_task(benchmark, odd, tmp_path / "odd")


def test_what_cannot_be_a_task_is_refused(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    data = benchmark.load(data_root)
    with pytest.raises(ValueError, match=r"^vqav2_test_dev: not scored here: test server required; "):
        write_task(get_benchmark("vqav2_test_dev"), data, tmp_path)
    (data.root / data.samples[0].images[0]).unlink()
    with pytest.raises(FileNotFoundError, match="1 images are missing"):
        write_task(benchmark, data, tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_the_command_prints_how_to_go_on(
    benchmark: Benchmark,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lmms_tasks, "get_benchmark", lambda _: benchmark)
    folder = tmp_path / "tasks"
    lmms_tasks.main(["--benchmarks", "easy_vqa", "--data-root", str(data_root), "--output", str(folder)])
    written, command = capsys.readouterr().out.splitlines()
    assert written == str(folder / "easy_vqa_local.yaml")
    assert command == f"python -m lmms_eval --include_path {folder} --tasks easy_vqa_local --model ..."
