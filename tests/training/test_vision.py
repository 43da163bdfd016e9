"""Stage 0, classification: its schedule, what its devices do to loss and model, and the published recipes in little."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from defocus_mllm import DefocusForImageClassification, DefocusImageProcessor
from training import stage0
from training.argument_parsing import parse_arguments
from training.arguments import Stage0VisionArguments
from training.run_record import MetricsFile
from training.vision import build_vision, drop_path_rate_at, vision_config

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
PUBLISHED = ("imagenet1k_base", "imagenet21k_large", "imagenet1k_large_384_finetune")
TINY_MAMBA = {
    **{"preset": "defocus_mamba_tiny", "image_size": 16, "hidden_size": 32, "num_hidden_layers": 2},
    **{"intermediate_size": 64, "time_step_rank": 4, "state_size": 4},
}


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """One process tests runs of different precision, which Accelerate otherwise refuses."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve pictures of two classes, larger than the encoder's images."""
    folder = tmp_path_factory.mktemp("classes")
    lines = []
    for number in range(12):
        name = ("ant", "bee")[number % 2]
        noise = numpy.random.default_rng(number).integers(0, 120, (24, 32, 3), dtype=numpy.uint8)
        noise[..., 0] += 120 * (number % 2)
        Image.fromarray(noise).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "label": name}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return str(folder / "metadata.jsonl")


def words(data: str, output_dir: Path, *extra: str) -> list[str]:
    common = ["--task", "classification", "--data", data, "--output_dir", str(output_dir), "--cpu"]
    small = ["--max_steps", "3", "--global_batch_size", "4", "--logging_steps", "1", "--learning_rate", "1e-2"]
    return [*common, *small, "--vision_config", json.dumps(toy_task.VISION_CONFIG), *extra]


def arguments(data: str, **fields: Any) -> Stage0VisionArguments:
    values = {"output_dir": "out", "data": data, "vision_config": dict(toy_task.VISION_CONFIG)}
    return Stage0VisionArguments(**{**values, **fields})


# --- drop path over the epochs ----------------------------------------------------------------------------------------


def test_drop_path_rises_from_epoch_to_epoch_as_released(data: str) -> None:
    base = arguments(data, min_drop_path_rate=0.1, drop_path_rate=0.75)
    rates = [drop_path_rate_at(epoch, 300, base) for epoch in range(300)]
    assert rates == pytest.approx([0.1 + 0.65 * epoch / 299 for epoch in range(300)])
    assert (rates[0], rates[299]) == pytest.approx((0.1, 0.75))
    assert drop_path_rate_at(0, 1, base) == pytest.approx(0.75)
    constant = arguments(data, min_drop_path_rate=0.4, drop_path_rate=0.4)
    assert {drop_path_rate_at(epoch, 90, constant) for epoch in range(90)} == {0.4}


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_each_epoch_sets_the_rates_of_all_blocks(data: str, mixer: str) -> None:
    own = TINY_MAMBA if mixer == "mamba" else {**toy_task.VISION_CONFIG, "mixer": mixer}
    own = {**own, "num_hidden_layers": 3}
    stage = build_vision(arguments(data, vision_config=own, min_drop_path_rate=0.1, drop_path_rate=0.7))
    assert stage.begin_epoch is not None
    for epoch, expected in ((0, [0.0, 0.05, 0.1]), (2, [0.0, 0.2, 0.4]), (4, [0.0, 0.35, 0.7])):
        stage.begin_epoch(epoch, 5)
        rates = [layer.drop_path.rate for layer in stage.model.encoder.layers]  # type: ignore[union-attr]
        assert rates == pytest.approx(expected)


# --- the loop with soft labels ----------------------------------------------------------------------------------------


def test_mixed_batches_train_and_resuming_changes_nothing(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = ["--mixup", "0.8", "--cutmix", "1", "--label_smoothing", "0.1", "--random_erasing", "0.5"]
    devices += ["--rand_augment", "9", "--crop_min_area", "0.1", "--repeated_augmentation", "3", "--save_steps", "2"]
    stage0.main(words(data, tmp_path / "straight", *devices, "--dataloader_num_workers", "1"))
    stage0.main(words(data, tmp_path / "resumed", *devices))
    (tmp_path / "resumed" / "model.safetensors").unlink()
    (tmp_path / "resumed" / "config.json").unlink()  # as if killed in the last step
    stage0.main(words(data, tmp_path / "resumed", *devices))
    assert "step-000002" in capsys.readouterr().out.split("continuing from")[1]
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    losses = [line["loss"] for line in MetricsFile(tmp_path / "straight").read()]
    assert len(losses) == 3
    assert all(0.2 < loss < 5 for loss in losses)


def test_repeated_augmentation_reaches_the_order_of_the_data(data: str) -> None:
    assert build_vision(arguments(data, repeated_augmentation=3)).repeats == 3
    assert build_vision(arguments(data)).repeats == 1


def test_accumulation_does_not_change_the_loss_of_smoothed_labels(data: str, tmp_path: Path) -> None:
    for name, size in (("whole", 4), ("parts", 2)):
        stage0.main(words(data, tmp_path / name, "--label_smoothing", "0.2", "--per_device_batch_size", str(size)))
    whole, parts = (MetricsFile(tmp_path / name).read()[0]["loss"] for name in ("whole", "parts"))
    assert whole == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("mixer", ["attention", "retention", "mamba"])
def test_training_changes_parameters_and_no_buffer(data: str, tmp_path: Path, mixer: str) -> None:
    """So the moving average needs the parameters only."""
    own = {**(TINY_MAMBA if mixer == "mamba" else toy_task.VISION_CONFIG), "mixer": mixer}
    own |= {"decay": "fixed", "rotary": "fixed"}
    before = build_vision(arguments(data, vision_config=own)).model
    buffers = dict(before.named_buffers())
    assert buffers
    stage0.main(words(data, tmp_path / "out", "--vision_config", json.dumps(own), "--ema_decay", "0.5"))
    after = DefocusForImageClassification.from_pretrained(tmp_path / "out")
    for name, tensor in after.named_buffers():
        assert torch.equal(tensor, buffers[name]), name


def test_gradient_checkpointing_changes_nothing_but_memory(data: str, tmp_path: Path) -> None:
    drop_path = ["--drop_path_rate", "0.5", "--min_drop_path_rate", "0.5"]
    for name, extra in (("plain", []), ("saving", ["--gradient_checkpointing"])):
        stage0.main(words(data, tmp_path / name, *drop_path, *extra))
    plain, saving = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "saving"))
    for name, tensor in plain.items():
        torch.testing.assert_close(saving[name], tensor, msg=name)


# --- where it starts --------------------------------------------------------------------------------------------------


def test_from_one_resolution_to_another(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    normalisation = ["--image_mean", "0.4", "0.5", "0.6", "--image_std", "0.2", "0.2", "0.3"]
    stage0.main(words(data, tmp_path / "small", *normalisation))
    larger = ["--model", str(tmp_path / "small"), "--vision_config", '{"image_size": 32}', "--learning_rate", "1e-9"]
    stage0.main(words(data, tmp_path / "large", *larger))
    shown = capsys.readouterr().out
    assert "images of 32 instead of 16 pixels" in shown
    assert "head keeps 2 of 2 classes" in shown
    model = DefocusForImageClassification.from_pretrained(tmp_path / "large")
    assert (model.config.image_size, model.config.delta_scale_factor, model.config.rope_scale_factor) == (32, 2, 4)
    small = DefocusForImageClassification.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(model.head.weight, small.head.weight, atol=1e-6, rtol=0)
    processor = DefocusImageProcessor.from_pretrained(tmp_path / "large")
    assert processor.size == {"height": 32, "width": 32}
    assert list(processor.image_mean) == [0.4, 0.5, 0.6]
    record = json.loads((tmp_path / "large" / "run.json").read_text())
    assert "model" in record["inputs"]
    assert len(record["facts"]["start"]) == 3
    given = arguments(data, model=str(tmp_path / "small"), image_mean=[0.1, 0.2, 0.3])
    (processor,) = build_vision(given).companions
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.2, 0.2, 0.3])  # type: ignore[attr-defined]


# --- the published recipes --------------------------------------------------------------------------------------------


def recipe_arguments(name: str, *extra: str) -> Stage0VisionArguments:
    given = ["--config", str(RECIPES / f"{name}.yaml"), "--data", "d", "--output_dir", "o", *extra]
    return parse_arguments(Stage0VisionArguments, "stage0_vision", given)


@pytest.mark.parametrize(
    ("name", "num_labels", "parameters"),
    [("imagenet1k_base", 1000, 92_650_832), ("imagenet21k_large", 21_841, 458_206_626)],
)
def test_recipes_build_the_published_models(name: str, num_labels: int, parameters: int) -> None:
    config = vision_config(recipe_arguments(name))
    config.id2label = {number: str(number) for number in range(num_labels)}
    with torch.device("meta"):
        model = DefocusForImageClassification(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameters  # the large one: 458.2 M in the release
    assert (config.delta_scale_factor, config.rope_scale_factor) == (1.0, 1.0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rates_follow_the_releases_scaling_with_the_batch(name: str) -> None:
    given = recipe_arguments(name)
    base_rate = {"imagenet1k_base": 5e-4, "imagenet21k_large": 1.25e-4, "imagenet1k_large_384_finetune": 2e-5}[name]
    warmup_epochs = {"imagenet1k_base": 20, "imagenet21k_large": 5, "imagenet1k_large_384_finetune": 2}[name]
    assert given.learning_rate == pytest.approx(base_rate * given.global_batch_size / 512)
    assert given.min_learning_rate == pytest.approx(5e-6 * given.global_batch_size / 512)
    assert given.warmup_ratio * given.num_train_epochs == pytest.approx(warmup_epochs, rel=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_of_a_published_recipe_has_a_source(name: str) -> None:
    """The fields that shape what is learned; [P] paper, [R] release."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    begin = lines.index("stage0_vision:")
    ours = ("logging_steps", "save_steps")
    for number, line in enumerate(lines[begin + 1 :], start=begin + 1):
        field = line.strip().partition(":")[0]
        if field and not field.startswith("#") and field not in ours:
            above = number
            while lines[above - 1].strip().startswith("#"):
                above -= 1
            assert any(source in "".join(lines[above : number + 1]) for source in ("[P]", "[R]")), line


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_recipe_runs_in_little(
    name: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [
        "--global_batch_size",
        "4",
        "--per_device_batch_size",
        "2",
        "--max_steps",
        "2",
        "--dataloader_num_workers",
        "0",
    ]
    common = ["--task", "classification", "--config", str(RECIPES / f"{name}.yaml"), "--data", data, "--cpu", *small]
    common += ["--validation_data", data, "--output_dir", str(tmp_path / "out")]
    if name.endswith("finetune"):
        own = ["--vision_config", json.dumps(TINY_MAMBA), "--mixed_precision", "bf16"]
        stage0.main(words(data, tmp_path / "start", *own))
        common += ["--model", str(tmp_path / "start"), "--vision_config", '{"image_size": 32}']
    else:
        common += ["--vision_config", json.dumps(TINY_MAMBA)]
    stage0.main([*common, "--dry_run"])
    assert "dry run: loss" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    stage0.main(common)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["status"], record["step"], record["saved_weights"]) == ("complete", 2, "average")
