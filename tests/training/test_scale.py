"""Two processes that share a model, whole (DDP) or in shards (FSDP2), learn what one does, one from text only."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

import defocus_mllm  # noqa: F401 - registers the Auto classes
from training import stage0, stage1, stage2
from training.checkpointing import load_training_state
from training.interruption import EXIT_STOPPED
from training.run_record import MetricsFile
from training.sampling import BatchPlan

CONFIGS = toy_task.ROOT / "training" / "accelerate_configs"
STEPS, BATCH, SEED = 4, 4, 4


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(folder, words of a stage 2 on four conversations with and four without an image)."""
    folder = tmp_path_factory.mktemp("scale")
    data, runs = toy_task.write_data(folder / "data"), folder / "runs"
    for main, stage in ((stage0.main, "stage0_language"), (stage0.main, "stage0_vision"), (stage1.main, "stage1")):
        main([*toy_task.stage_words(stage, data, runs), "--max_steps", "1"])
    records = [json.loads((data / name).read_text()) for name in ("conversations.json", "dialogues.json")]
    (data / "conversations.json").write_text(json.dumps(records[0][:4] + 2 * records[1]))
    words = [*toy_task.stage_words("stage2", data, runs), "--train", "projector", "language_model", "vision_tower"]
    words += ["--max_steps", str(STEPS), "--global_batch_size", str(BATCH), "--seed", str(SEED), "--save_steps", "2"]
    return folder, words


def one_process(toy: tuple[Path, list[str]], config: str) -> tuple[Path, list[str]]:
    """(the run of one process that `config` is held against, the words of both)."""
    folder, words = toy
    average = "0" if config.startswith("zero") else "0.9"
    words = [*words, "--ema_decay", average]
    run = folder / f"one-{average}"
    if not run.exists():
        stage2.main([*words, "--output_dir", str(run)])
    return run, words


def begun(run: Path, folder: Path) -> Path:
    """`folder` as the run in `run` had left it after two steps."""
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(run / name, folder / name)
    shutil.copytree(run / "checkpoints" / "step-000002", folder / "checkpoints" / "step-000002")
    return folder


def launched(config: str, words: list[str]) -> list[str]:
    """Two processes of stage 2 as a user starts them."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", "0", toy_task.script("stage2")]
    return [*launch, *words, "--per_device_batch_size", "1", "--world_size", "2"]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in MetricsFile(run).read()]


def test_a_process_has_only_text_while_the_other_has_images() -> None:
    """Else the comparison below would not show what it is to show."""
    plan = BatchPlan(num_samples=8, global_batch_size=BATCH, per_device_batch_size=1, world_size=2, seed=SEED)
    has_image = [
        [[key.sample < 4 for key in plan.keys(step, micro, rank)] for rank in (0, 1)]
        for step in range(STEPS)
        for micro in range(plan.accumulation_steps)
    ]
    assert any(any(first) != any(second) for first, second in has_image)


def needs_deepspeed(config: str) -> Any:
    missing = importlib.util.find_spec("deepspeed") is None
    return pytest.param(config, marks=pytest.mark.skipif(missing, reason="DeepSpeed is not installed"))


@pytest.mark.parametrize("config", ["ddp", "fsdp2", needs_deepspeed("zero2"), needs_deepspeed("zero3")])
def test_two_processes_learn_what_one_does(toy: tuple[Path, list[str]], config: str) -> None:
    one, words = one_process(toy, config)
    run = toy[0] / config
    done = toy_task.launch(launched(config, [*words, "--output_dir", str(run)]), timeout=250)
    assert done.returncode == 0, done.stderr
    assert "x 2 process(es)" in done.stdout
    assert done.stdout.count("=== stage2 ===") == 1  # only one of them speaks
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert_equal_runs(run, one)
    assert type(AutoModelForImageTextToText.from_pretrained(run)).__name__ == "DefocusForConditionalGeneration"
    state = load_training_state(run / "checkpoints" / "step-000002")
    moments = [tensor for values in state["optimizer"]["state"].values() for tensor in values.values()]
    assert all(type(tensor) is torch.Tensor for tensor in [*moments, *state["average"]])
    continued = begun(run, toy[0] / f"{config}-continued")  # by one process
    stage2.main([*words, "--output_dir", str(continued)])
    assert_equal_runs(continued, one)


@pytest.mark.parametrize("config", ["fsdp2", needs_deepspeed("zero2"), needs_deepspeed("zero3")])
def test_two_processes_continue_what_one_has_begun(toy: tuple[Path, list[str]], config: str) -> None:
    one, words = one_process(toy, config)
    run = begun(one, toy[0] / f"one-continued-{config}")
    done = toy_task.launch(launched(config, [*words, "--output_dir", str(run)]), timeout=250)
    assert done.returncode == 0, done.stderr
    assert "step-000002" in done.stdout
    assert_equal_runs(run, one)


def assert_equal_runs(run: Path, one: Path) -> None:
    """Losses to 1e-5 at every step, gradients, and the final weights, all of them whole."""
    alone, shared = losses(one), losses(run)
    assert len(alone) == len(shared) == STEPS
    for (loss, norm), (expected_loss, expected_norm) in zip(shared, alone, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    expected, weights = load_file(one / "model.safetensors"), load_file(run / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.shape == expected[name].shape  # the projector's too, and not size([0])
        assert tensor.allclose(expected[name], atol=1e-4), name


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(toy: tuple[Path, list[str]]) -> None:
    """As Slurm's may: SIGUSR1 to the processes, while the launcher ignores it (`trap '' USR1`)."""
    folder, words = toy
    run = folder / "stopped"
    words = launched("fsdp2", [*words, "--output_dir", str(run), "--max_steps", "2000"])
    shell = f"trap '' USR1; exec {sys.executable} " + " ".join(f"'{word}'" for word in words)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(["bash", "-c", shell], env=toy_task.environment(), **pipes)
    while not (run / "metrics.jsonl").exists() and process.poll() is None:
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "stage2"], capture_output=True, text=True)
    subprocess.run(["kill", f"-{signal.SIGUSR1}", children.stdout.split()[-1]], check=True)
    output, _ = process.communicate(timeout=200)
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["stopped_by"]) == ("interrupted", "SIGUSR1"), output
    assert f"stopped by SIGUSR1 after step {record['step']} of 2,000" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{record['step']:06d}"]
    assert f"exitcode  : {EXIT_STOPPED}" in output  # the launcher may end the other before it leaves by itself


@pytest.mark.parametrize("words", [["--world_size", "2"], ["--world_size", "2", "--dry_run"]])
def test_one_process_where_two_were_wanted_is_refused(toy: tuple[Path, list[str]], words: list[str]) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process without a word."""
    with pytest.raises(ValueError, match="world_size: 2 processes were asked for, but 1 run"):
        stage2.main([*toy[1], "--output_dir", str(toy[0] / "alone"), *words])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_ones_accelerate_reads(path: Path) -> None:
    """With its own loader, which refuses unknown fields."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # a recipe says it
    content = yaml.safe_load(path.read_text())
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
        assert config.deepspeed_config["gradient_accumulation_steps"] == 1
    if path.stem.startswith("fsdp"):
        assert config.fsdp_config["fsdp_version"] == int(path.stem[-1])
    assert content["num_processes"] > 1
