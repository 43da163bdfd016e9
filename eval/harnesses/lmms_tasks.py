"""Our benchmarks as tasks of lmms-eval: the same questions and prompts, scored by the same rules.

    python -m eval.harnesses.lmms_tasks --benchmarks easy_vqa --output DIR
    python -m lmms_eval --include_path DIR --tasks easy_vqa_local --model ...

Any model of lmms-eval can be asked. With `--log_samples` the log of the samples is a predictions file for `eval.score`,
which adds the intervals. Interface: EvolvingLMMs-Lab/lmms-eval 0.7.3, `lmms_eval/api/task.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from defocus_mllm.console import run_script
from defocus_mllm.files import write_text_atomically
from defocus_mllm.images import load_image
from eval.files import json_line
from eval.images import check_images_exist
from eval.registry import Benchmark, get_benchmark
from eval.results import score_rows_together, score_samples
from eval.samples import BenchmarkData, Prediction, Sample

SUFFIX = "_local"
"""A benchmark's task has its name and this."""

_TASK = """\
# Written by python -m eval.harnesses.lmms_tasks; the data lie beside it.
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    {split}: {data}
test_split: {split}
output_type: generate_until
doc_to_visual: !function eval.harnesses.lmms_tasks.doc_to_visual
doc_to_text: prompt
doc_to_target: target
process_results: !function eval.harnesses.lmms_tasks.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  do_sample: false
  temperature: 0
  num_beams: 1
  until: []
metric_list:
{metrics}
# No field of a row has this name: lmms-eval takes the standard error of one field for that of every metric.
score_key: not_estimated_here
metadata:
  version: {version}
"""
_METRIC = """\
  - metric: {name}
    aggregation: !function eval.harnesses.lmms_tasks.aggregate
    higher_is_better: {higher}"""


def write_task(benchmark: Benchmark, data: BenchmarkData, folder: Path) -> Path:
    """Write the benchmark's task and its data into `folder`; returns the YAML file.

    Raises:
        ValueError: nothing scores this benchmark but its test server, or a sample cannot be read back from JSON.
        FileNotFoundError: images are missing.
    """
    if not benchmark.metrics:
        raise ValueError(f"{benchmark.name}: {benchmark.not_scored_here}; python -m eval.run writes the file for it")
    benchmark.check_askable(data)
    images = {image for sample in data.samples for image in sample.images}
    data.provide_images(sorted(images))
    check_images_exist({data.image_root / image for image in images})
    folder.mkdir(parents=True, exist_ok=True)
    task = benchmark.name + SUFFIX
    scored = [benchmark.judge("", sample) for sample in data.samples]
    metrics = [metric for metric in benchmark.metrics if metric.applies_to(scored)]
    rows = [_document(benchmark, data.image_root, sample) for sample in data.samples]
    for row, sample in zip(rows, data.samples, strict=True):
        if _sample(row) != sample:
            raise ValueError(f"{benchmark.name}: sample {sample.id!r} holds values that JSON does not keep")
    write_text_atomically(folder / f"{task}.jsonl", "".join(map(json_line, rows)))
    text = _TASK.format(
        task=task,
        split=benchmark.split,
        data=json.dumps(f"{task}.jsonl"),
        max_new_tokens=benchmark.max_new_tokens,
        metrics="\n".join(
            _METRIC.format(name=metric.name, higher=json.dumps(metric.higher_is_better)) for metric in metrics
        ),
        version=json.dumps(benchmark.version),
    )
    write_text_atomically(folder / f"{task}.yaml", text)
    return folder / f"{task}.yaml"


def _document(benchmark: Benchmark, root: Path, sample: Sample) -> dict[str, Any]:
    """A row of the task's data; `sample` is JSON in a text, because its fields differ from row to row."""
    return {
        "id": sample.id,
        "benchmark": benchmark.name,
        "prompt": benchmark.prompt(sample),
        "images": [str((root / image).absolute()) for image in sample.images],
        "target": sample.target,
        "sample": json.dumps(asdict(sample), ensure_ascii=False),
    }


def _sample(document: Mapping[str, Any]) -> Sample:
    fields: dict[str, Any] = json.loads(document["sample"])
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Sample(**fields)


def doc_to_visual(document: Mapping[str, Any]) -> list[Image.Image]:
    """The pictures of a document, 8-bit RGB."""
    return [load_image(path) for path in document["images"]]


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The scored row of an answer under the name of every metric of its task, and `id` and `text` for `eval.score`."""
    benchmark, sample = get_benchmark(document["benchmark"]), _sample(document)
    prediction = Prediction(sample.id, results[0])
    (row,) = score_samples(benchmark, [sample], {sample.id: prediction})
    names = [metric.name for metric in benchmark.metrics if metric.applies_to([row])]
    named = {name: row | {"benchmark": benchmark.name, "metric": name} for name in names}
    return {"id": prediction.id, "text": prediction.text, **named}


def aggregate(rows: Sequence[Mapping[str, Any]]) -> float:
    """The metric that the rows of `process_results` name, over all of them."""
    benchmark = get_benchmark(rows[0]["benchmark"])
    metrics = {metric.name: metric for metric in benchmark.metrics}
    return metrics[rows[0]["metric"]].value(score_rows_together(benchmark, [dict(row) for row in rows]))


def main(argv: Sequence[str] | None = None) -> None:
    """Write a task for each benchmark named, and print how to run them."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.harnesses.lmms_tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--benchmarks", required=True, metavar="A,B", help="names, separated by commas")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder for --include_path")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="data in DIR/BENCHMARK instead of the default")
    arguments = parser.parse_args(argv)
    benchmarks = [get_benchmark(name) for name in arguments.benchmarks.split(",")]
    for benchmark in benchmarks:
        print(write_task(benchmark, benchmark.load_verified(arguments.data_root), arguments.output))
    tasks = ",".join(benchmark.name + SUFFIX for benchmark in benchmarks)
    print(f"python -m lmms_eval --include_path {arguments.output} --tasks {tasks} --model ...")


if __name__ == "__main__":
    run_script(main)
