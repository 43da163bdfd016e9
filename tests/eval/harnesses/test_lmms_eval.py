"""lmms-eval itself, with 1 and 2 processes, gives the answers and the score of `eval.run`.

`make harness-tests` makes an environment in which this runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from defocus_mllm import (
    DefocusConfig,
    DefocusForConditionalGeneration,
    DefocusImageProcessor,
    DefocusProcessor,
    DefocusVisionConfig,
)
from eval.files import read_json, read_json_lines
from eval.generator import TransformersGenerator
from eval.harnesses import lmms_tasks
from eval.registry import get_benchmark
from eval.run import evaluate
from eval.score import main as score
from tests.conftest import ANSWERS, SENTENCES, SIZES
from tests.eval.harnesses.learned_model import learn
from training.tokenizer import train_tokenizer

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here; make harness-tests makes a place for it")
pytest.importorskip("easy_vqa")

QUESTIONS = 41  # odd: of two processes one has more, and lmms-eval pads the other
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@dataclass(frozen=True)
class Harness:
    """A folder with a model, lmms-eval's task, and what `eval.run` made of them."""

    folder: Path

    @property
    def ours(self) -> dict[str, tuple]:
        rows = read_json_lines(self.folder / "ours" / "easy_vqa" / "samples.jsonl")
        return {row["id"]: (row["text"], row["n_in"], row["n_out"], row["score"]) for row in rows}

    @property
    def accuracy(self) -> float:
        results = read_json(self.folder / "ours" / "easy_vqa" / "results.json")
        return results["partial_metrics"]["accuracy"]["value"]

    def run(self, name: str, *options: str, launcher: tuple[str, ...] = (), world_size: int = 1) -> Finished:
        """lmms-eval's command line, from a folder where nothing of ours lies."""
        command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "defocus_mllm", "--device", "cpu"]
        command += ["--model_args", f"pretrained={self.folder / 'model'},world_size={world_size}"]
        command += ["--include_path", str(self.folder / "tasks"), "--tasks", "easy_vqa_local"]
        command += ["--limit", str(QUESTIONS), "--log_samples", "--output_path", str(self.folder / name), *options]
        variables = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(self.folder / "datasets")}
        finished = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=240)
        return Finished(self.folder / name, finished.stdout + finished.stderr, finished.returncode)


@dataclass(frozen=True)
class Finished:
    """A run of lmms-eval."""

    folder: Path
    output: str
    code: int

    def file(self, pattern: str) -> Path:
        found = list(self.folder.rglob(pattern))
        assert len(found) == 1, self.output[-4000:]
        return found[0]

    @property
    def log(self) -> Path:
        return self.file("*_samples_easy_vqa_local.jsonl")

    @property
    def rows(self) -> dict[str, tuple]:
        """What the log says of every sample, in the form of `Harness.ours`."""
        rows = {}
        for row in read_json_lines(self.log):
            counts = row["token_counts"][0] or {"input_tokens": None, "output_tokens": None}
            assert row["filtered_resps"] == row["text"]
            tokens = (counts["input_tokens"], counts["output_tokens"])
            rows[row["id"]] = (row["text"], *tokens, row["accuracy"]["score"])
        return rows

    @property
    def accuracy(self) -> float:
        return read_json(self.file("*_results.json"))["results"]["easy_vqa_local"]["accuracy,none"]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    train_tokenizer(SENTENCES + ANSWERS, 320, folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    vision = DefocusVisionConfig(image_size=32, patch_size=8, **SIZES)
    images = DefocusImageProcessor(size={"height": 32, "width": 32})
    processor = DefocusProcessor(images, tokenizer, num_image_tokens=vision.num_image_tokens)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), **SIZES, **ids}
    config = DefocusConfig(vision_config=vision, text_config=text, image_token_id=tokenizer.image_token_id)
    model = DefocusForConditionalGeneration(config)
    benchmark = get_benchmark("easy_vqa")
    data = benchmark.load_verified(None)
    learn(model, processor, data, data.samples[: QUESTIONS // 2])
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    lmms_tasks.main(["--benchmarks", "easy_vqa", "--output", str(folder / "tasks")])
    evaluate(benchmark, TransformersGenerator(folder / "model", "cpu"), folder / "ours", limit=QUESTIONS)
    return Harness(folder)


@pytest.fixture(scope="module")
def first(harness: Harness) -> Finished:
    """One process, its cache empty."""
    return harness.run("first", "--batch_size", "auto", "--use_cache", str(harness.folder / "cache"))


def test_one_process(harness: Harness, first: Finished) -> None:
    assert len({text for text, *_ in harness.ours.values()}) > 3, "a model that ignores its input tests nothing"
    assert first.rows == harness.ours
    assert first.accuracy == harness.accuracy
    assert 0.2 < first.accuracy < 1
    assert f"0 hits, {QUESTIONS} misses" in first.output


def test_a_second_run_answers_from_the_cache(harness: Harness, first: Finished) -> None:
    second = harness.run("second", "--batch_size", "1", "--use_cache", str(harness.folder / "cache"))
    assert f"{QUESTIONS} hits, {QUESTIONS} from shared DB, 0 misses" in second.output
    # The cache keeps no counts of tokens.
    assert second.rows == {name: (text, None, None, score) for name, (text, _, _, score) in first.rows.items()}
    assert second.accuracy == first.accuracy


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes(harness: Harness, launcher: list[str], request: pytest.FixtureRequest) -> None:
    run = harness.run(request.node.callspec.id, "--batch_size", "4", launcher=tuple(launcher), world_size=2)
    assert "Running on rank 1" in run.output
    assert run.rows == harness.ours
    assert run.accuracy == harness.accuracy


def test_the_log_of_samples_is_a_predictions_file(
    harness: Harness, first: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = harness.folder / "scored_here"
    score(["--benchmark", "easy_vqa", "--predictions", str(first.log), "--partial", "--output", str(folder)])
    assert f"partial {QUESTIONS}/9673" in capsys.readouterr().out
    (results,) = folder.rglob("results.json")
    assert read_json(results)["partial_metrics"]["accuracy"]["value"] == harness.accuracy


def test_a_setting_that_is_not_supported_fails_the_run(harness: Harness) -> None:
    run = harness.run("sampled", "--gen_kwargs", "temperature=0.7", "--verbosity", "DEBUG")
    assert run.code == 1
    assert "easy_vqa_local: generation setting temperature=0.7 is not supported" in run.output
    assert not list(run.folder.rglob("*_results.json"))
