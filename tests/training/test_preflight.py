"""What would fail or learn nothing hours later is one line before step 0; what is tried leaves no trace."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

from defocus_mllm.console import USER_ERRORS
from training import preflight, stage0, stage1, stage2
from training.freezing import FreezePlan
from training.loop import TrainingLoop
from training.memory import activation_bytes
from training.preflight import PreflightError
from training.rehearsal import clean_generation_config
from training.stage import Stage


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, runs): everything up to stage 1."""
    folder = tmp_path_factory.mktemp("preflight")
    data, runs = toy_task.write_data(folder / "data"), folder / "runs"
    for name, main in (("stage0_language", stage0.main), ("stage0_vision", stage0.main), ("stage1", stage1.main)):
        main(toy_task.stage_words(name, data, runs))
    return data, runs


def run(toy: tuple[Path, Path], output: Path, *extra: str) -> None:
    stage2.main([*toy_task.stage_words("stage2", *toy), "--output_dir", str(output), *extra])


@pytest.mark.parametrize("words", [["--dry_run"], ["--dry_run", "true"]])
def test_a_dry_run_shows_all_and_leaves_nothing(
    toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    run(toy, tmp_path / "dry", *words)
    shown = capsys.readouterr().out
    assert "8 samples, 2 epoch(s), 4 steps" in shown
    assert "global batch 4 = 4 a device x 1 accumulated x 1 process(es)" in shown
    assert "memory of a process, estimated: weights" in shown
    assert "8 of 8 conversations checked" in shown
    assert "an epoch has about" in shown
    assert "saved and loaded with the same weights and logits; it answers '" in shown
    assert "none in what is frozen" in shown
    assert "projector 0." in shown or "projector 1." in shown
    assert not (tmp_path / "dry").exists()


def test_a_dry_run_looks_at_few_samples(
    toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.multimodal.DRY_RUN_SAMPLES", 3)
    run(toy, tmp_path / "dry", "--dry_run")
    assert "3 of 8 conversations checked" in capsys.readouterr().out


def test_every_run_begins_with_it_and_ends_as_if_it_had_not(
    toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = ["--lora_rank", "2", "--lora_dropout", "0.5"]  # something that draws random numbers
    run(toy, tmp_path / "with", *lora)
    assert "preflight: loss" in capsys.readouterr().out
    assert not list((tmp_path / "with").glob(".partial*"))
    monkeypatch.setattr("training.stages.rehearse", lambda *arguments: "")
    run(toy, tmp_path / "without", *lora)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def broken(toy: tuple[Path, Path], output: Path, monkeypatch: pytest.MonkeyPatch, change: Any, *extra: str) -> str:
    """The message of a run whose (loop, stage, freeze) were changed before the preflight."""

    def changed(loop: TrainingLoop, stage: Stage, freeze: FreezePlan) -> str:
        change(loop, stage, freeze)
        return preflight.rehearse(loop, stage, freeze)

    monkeypatch.setattr("training.stages.rehearse", changed)
    with pytest.raises(USER_ERRORS) as caught:
        run(toy, output, *extra)
    assert not output.exists()
    return str(caught.value)


def test_a_part_that_gets_no_gradient_is_named(
    toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(loop: TrainingLoop, stage: Stage, freeze: FreezePlan) -> None:
        projector: Any = stage.components["projector"][0]
        projector.register_forward_hook(lambda module, given, output: output.detach())

    message = broken(toy, tmp_path / "out", monkeypatch, cut)
    assert "projector is to be trained but gets no gradient" in message


def test_a_gradient_that_is_not_finite_is_named(
    toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(loop: TrainingLoop, stage: Stage, freeze: FreezePlan) -> None:
        projector: Any = stage.components["projector"][0]
        projector.linear_1.weight.register_hook(lambda gradient: gradient * float("nan"))

    message = broken(toy, tmp_path / "out", monkeypatch, spoil)
    assert "the gradient of projector is nan" in message


def test_a_loss_that_is_not_finite_is_named(
    toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(loop: TrainingLoop, stage: Stage, freeze: FreezePlan) -> None:
        next(stage.model.parameters()).data.fill_(float("nan"))

    assert "the loss of the first batch is nan" in broken(toy, tmp_path / "out", monkeypatch, spoil)


def test_a_frozen_part_with_a_gradient_is_named(
    toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def thaw(loop: TrainingLoop, stage: Stage, freeze: FreezePlan) -> None:
        next(stage.components["vision_tower"][0].parameters()).requires_grad_(True)

    message = broken(toy, tmp_path / "out", monkeypatch, thaw)
    assert message.startswith("model.vision_tower.")
    assert "is frozen but has a gradient" in message


def test_a_weight_that_is_not_saved_as_it_is_is_named(
    toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shift(model: nn.Module, folder: Path) -> nn.Module:
        loaded = load_saved(model, folder)
        next(loaded.parameters()).data.add_(1)
        return loaded

    load_saved = preflight.load_saved
    monkeypatch.setattr(preflight, "load_saved", shift)
    message = broken(toy, tmp_path / "out", monkeypatch, lambda *arguments: None)
    assert "changes when the model is saved and loaded" in message


def test_a_setting_that_is_not_saved_shows_in_the_logits(
    toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scale(loop: TrainingLoop, stage: Stage, freeze: FreezePlan) -> None:
        head: Any = stage.model.get_output_embeddings()  # type: ignore[operator]
        head.register_forward_hook(lambda module, given, output: 2 * output)

    message = broken(toy, tmp_path / "out", monkeypatch, scale)
    assert "the same weights but other logits" in message


def test_a_picture_may_come_late_but_must_come(
    toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Micro-batches of one sample, nearly all of them without a picture; then all of them."""
    data = toy_task.write_data(tmp_path / "data")
    texts = json.loads((data / "dialogues.json").read_text()) * 4
    picture = json.loads((data / "captions.json").read_text())[:1]
    (data / "conversations.json").write_text(json.dumps([*texts, *picture]))
    words = ["--per_device_batch_size", "1", "--max_steps", "4"]
    run((data, toy[1]), tmp_path / "late", *words)
    assert "preflight: loss" in capsys.readouterr().out
    (data / "conversations.json").write_text(json.dumps(texts))
    with pytest.raises(PreflightError, match="projector is to be trained but gets no gradient"):
        run((data, toy[1]), tmp_path / "never", *words)


def test_a_generation_config_that_contradicts_itself_is_mended(model) -> None:
    """Vicuna's, which ended LLaVA's runs when their model was to be saved."""
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.9, top_p=0.6, eos_token_id=2)
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.validate(strict=True)
    notes = clean_generation_config(model)
    assert len(notes) == 2
    assert "temperature 0.9 removed" in notes[0]
    model.generation_config.validate(strict=True)
    assert model.generation_config.eos_token_id == 2
    assert clean_generation_config(model) == []


def test_a_generation_config_that_samples_stays(model) -> None:
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.9)
    assert clean_generation_config(model) == []
    assert model.generation_config.temperature == 0.9


def test_activations_by_hand(model) -> None:
    """32 layers of width 4096 in 16 bits: 34 bytes a token, layer and unit; recomputed 2 and one layer's 34."""
    config: Any = type("Config", (), {"hidden_size": 4096, "num_hidden_layers": 32})
    assert activation_bytes(config, 2048, 2, recomputed=False) == 34 * 2048 * 4096 * 32
    assert activation_bytes(config, 2048, 2, recomputed=True) == 2048 * 4096 * (2 * 32 + 34)
    assert activation_bytes(config, 2048, 2, recomputed=True, learns=False) == 34 * 2048 * 4096
    with_head = activation_bytes(config, 2048, 2, recomputed=True, vocabulary=32_000)
    assert with_head - activation_bytes(config, 2048, 2, recomputed=True) == 2048 * 32_000 * 10
