"""The runner: what it runs, skips and continues, what a failure leaves, and that nothing outlives it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from PIL import Image

from defocus_mllm.console import EXIT_USER_ERROR
from training import classify, evidence, stage0
from training.evidence_models import EvidenceModel
from training.loop import TrainingLoop
from training.pipeline import Step

RECIPE = """
stage0_vision:
  vision_config: {hidden_size: 16, image_size: 8, patch_size: 4, initializer_range: 0.25}
  max_steps: 3
  global_batch_size: 8
  learning_rate: 1e-2
  logging_steps: 1
  save_steps: 1
evidence:
  attention: {num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}
  retention: {num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24}
  mamba: {num_hidden_layers: 1, intermediate_size: 32, state_size: 4, time_step_rank: 2, group_norm_size: 16}
"""
BLOCKS = ("timeit", "-n1", "-r1", "import signal; signal.pause()")
"""`python -m` these words: a process that ends only when it is ended."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    for name, number in (("train", 16), ("test", 10)):
        pictures = [Image.new("RGB", (8, 8), (40 + 150 * (index % 2), index, 0)) for index in range(number)]
        rows = {"image": pictures, "label": [index % 2 for index in range(number)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{name}.parquet"))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modules that were started; each runs in this process, where importing it costs nothing."""
    started: list[str] = []
    mains = {"training.stage0": stage0.main, "training.classify": classify.main}

    class Process:
        def __init__(self, words: list[str], **options: Any) -> None:
            assert words[:2] == [sys.executable, "-m"]
            started.append(words[2])
            self.words = words

        def wait(self) -> int:
            try:
                mains[self.words[2]](self.words[3:])
            except (ValueError, KeyboardInterrupt):
                return EXIT_USER_ERROR
            return 0

        def terminate(self) -> None: ...

    monkeypatch.setattr(evidence, "subprocess", SimpleNamespace(Popen=Process, STDOUT=None))
    return started


def words(inputs: Path, output: Path, *more: str) -> list[str]:
    given = ["--config", str(inputs / "recipe.yaml"), "--output_dir", str(output), "--cpu"]
    return [*given, "--train", str(inputs / "train.parquet"), "--test", str(inputs / "test.parquet"), *more]


def read(output: Path) -> dict[str, Any]:
    return json.loads((output / "main" / "results.json").read_text())


def test_runs_are_made_once_and_tabulated(
    inputs: Path, tmp_path: Path, commands: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(inputs, tmp_path / "out", "--models", "causal_vit", "defocus_vit", "--seeds", "0", "1")
    evidence.main(given)
    assert commands == ["training.stage0", "training.classify"] * 4
    results = read(tmp_path / "out")
    assert not results["partial"]
    assert [(row["title"], row["seeds"]) for row in results["models"]] == [
        ("causal ViT", [0, 1]),
        ("De-focus ViT", [0, 1]),
    ]
    runs = {path.name: json.loads((path / "run.json").read_text()) for path in (tmp_path / "out" / "runs").iterdir()}
    assert {name: run["arguments"]["vision_config"]["decay"] for name, run in runs.items()} == {
        **dict.fromkeys(("causal_vit-seed0", "causal_vit-seed1"), "none"),
        **dict.fromkeys(("defocus_vit-seed0", "defocus_vit-seed1"), "learnable"),
    }
    assert runs["causal_vit-seed1"]["seed"] == 1
    assert results["models"][0]["parameters"] == runs["causal_vit-seed0"]["parameters"]  # counted before, rightly
    predictions = json.loads((tmp_path / "out" / "predictions" / "causal_vit-seed1.json").read_text())
    right = sum(one == other for one, other in zip(predictions["labels"], predictions["predictions"], strict=True))
    assert results["models"][0]["by_seed"][1] == right / 10
    assert "4/4" not in capsys.readouterr().out  # no progress line after the last run

    commands.clear()
    page = tmp_path / "page.md"
    evidence.main([*given, "--processes", "0", "--write", str(page)])
    assert commands == []
    assert "| causal ViT |" in page.read_text()
    assert {**read(tmp_path / "out"), "command": ""} == {**results, "command": ""}


def test_interrupted_run_continues_from_its_checkpoint(
    inputs: Path, tmp_path: Path, commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = words(inputs, tmp_path / "straight", "--models", "causal_vit")
    evidence.main(straight)
    original = TrainingLoop._take_step

    def stop_in_step_2(loop: TrainingLoop, batches: Any) -> None:
        if loop.step == 2:
            raise KeyboardInterrupt
        original(loop, batches)

    stopped = words(inputs, tmp_path / "stopped", "--models", "causal_vit")
    monkeypatch.setattr(TrainingLoop, "_take_step", stop_in_step_2)
    with pytest.raises(ValueError, match=r"1 run\(s\) failed: causal_vit seed 0 \(see .*causal_vit-seed0\.log\)"):
        evidence.main(stopped)
    assert "Partial: 0 of 1" in (tmp_path / "stopped" / "main" / "table.md").read_text()
    monkeypatch.setattr(TrainingLoop, "_take_step", original)
    evidence.main(stopped)
    run = json.loads((tmp_path / "stopped" / "runs" / "causal_vit-seed0" / "run.json").read_text())
    assert run["resumed_from_step"] == 2
    names = [tmp_path / name / "predictions" / "causal_vit-seed0.json" for name in ("straight", "stopped")]
    assert names[0].read_text() == names[1].read_text()  # the same weights


def test_failed_run_leaves_the_others_alone(inputs: Path, tmp_path: Path, commands: list[str]) -> None:
    blocked = tmp_path / "runs" / "causal_vit-seed0"
    blocked.mkdir(parents=True)
    (blocked / "notes.txt").write_text("not a run's folder")
    with pytest.raises(ValueError, match=r"1 run\(s\) failed: causal_vit"):
        evidence.main(words(inputs, tmp_path, "--models", "causal_vit", "defocus_vit"))
    assert commands == ["training.stage0", "training.stage0", "training.classify"]
    results = read(tmp_path)
    assert results["partial"]
    assert [row["seeds"] for row in results["models"]] == [[], [0]]


def test_mistakes_show_before_the_first_run(inputs: Path, tmp_path: Path, commands: list[str]) -> None:
    with pytest.raises(ValueError, match="--config is missing"):
        evidence.main(words(inputs, tmp_path)[2:])
    with pytest.raises(ValueError, match="has no 'vit'"):
        evidence.main(words(inputs, tmp_path, "--models", "vit"))
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        evidence.main(words(inputs, tmp_path, "--models", "causal_vit", "--test", str(tmp_path / "nowhere.parquet")))
    with pytest.raises(ValueError, match="differ by more than 2 % in size"):
        evidence.main(words(inputs, tmp_path))  # the recipe's sizes fit the two that other tests train
    assert commands == []


def test_remaining_time_is_told_from_runs_of_the_same_mixer() -> None:
    mixers = ("attention", "attention", "mamba", "mamba")
    keys: list[Any] = [
        evidence.Run(EvidenceModel(mixer, mixer, mixer, {}), 0, Path(), Path(), Path(), ()) for mixer in mixers
    ]
    done = dict(zip(keys, [(1.0, 100.0), (0.5, 60.0), (0.25, 100.0), (0.0, 0.0)], strict=True))
    assert evidence.remaining_seconds(done) == 60 + 300 + 400
    assert evidence.remaining_seconds(dict.fromkeys(keys, (0.0, 0.0))) == 0


def test_nothing_outlives_a_stopped_runner(tmp_path: Path) -> None:
    step = Step("blocks", BLOCKS)
    run: Any = SimpleNamespace(log=tmp_path / "logs" / "run.log", steps=(step, step))
    with evidence._alone_in(tmp_path) as lock:
        workers = evidence._Workers(1, lock)
        with contextlib.suppress(KeyboardInterrupt), workers:
            future, second = workers.start(run), workers.start(run)
            while not workers._processes:
                assert not future.done()
            (process,) = workers._processes
            raise KeyboardInterrupt
        assert process.poll() is not None
        assert future.result() != 0
        assert second.cancelled()
    assert (tmp_path / "logs" / "run.log").read_text().count("timeit") == 1  # its second command was not started


def test_a_run_left_behind_keeps_others_out(tmp_path: Path) -> None:
    with evidence._alone_in(tmp_path) as lock:
        left = subprocess.Popen([sys.executable, "-m", *BLOCKS], pass_fds=(lock,))
        with pytest.raises(ValueError, match="another runner, or a run it left behind"), evidence._alone_in(tmp_path):
            pass
    try:
        with pytest.raises(ValueError, match="another runner, or a run it left behind"), evidence._alone_in(tmp_path):
            pass
    finally:
        left.kill()
        left.wait()
    with evidence._alone_in(tmp_path):
        pass
