"""Validation of stages 1 and 2: the loss of a plain count, no trace in what is learned, answers that can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

from training import replay, stage0, stage1, stage2
from training.conversations import load_conversations
from training.encoding import IGNORED
from training.engine import NonFiniteLossError
from training.run_record import MetricsFile
from training.supervision import encode_conversation


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, runs): everything up to stage 1, and three held-out conversations, one without an image."""
    folder = tmp_path_factory.mktemp("held_out")
    data, runs = toy_task.write_data(folder / "data"), folder / "runs"
    for name, main in (("stage0_language", stage0.main), ("stage0_vision", stage0.main), ("stage1", stage1.main)):
        main(toy_task.stage_words(name, data, runs))
    records = json.loads((data / "conversations.json").read_text())
    held = [records[0], json.loads((data / "dialogues.json").read_text())[0], records[3]]
    (data / "held.json").write_text(json.dumps(held))
    return data, runs


def words(toy: tuple[Path, Path], output: Path, *extra: str) -> list[str]:
    held = ["--validation_data", str(toy[0] / "held.json"), "--validation_steps", "2"]
    return [*toy_task.stage_words("stage2", *toy), "--output_dir", str(output), *held, *extra]


def validations(folder: Path) -> list[dict[str, Any]]:
    return [line for line in MetricsFile(folder).read() if "validation_loss" in line]


def expected_loss(folder: Path, data: Path) -> tuple[float, int]:
    """(mean, number of tokens), one conversation after the other."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    losses = []
    for conversation in load_conversations(data / "held.json", data / "images"):
        example = encode_conversation(processor, conversation.messages)
        pixels = {"pixel_values": example["pixel_values"]} if "pixel_values" in example else {}
        with torch.no_grad():
            logits = model(input_ids=example["input_ids"][None], **pixels).logits[0, :-1]
        targets = example["labels"][1:]
        losses.append(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")[targets != IGNORED])
    together = torch.cat(losses)
    return together.mean().item(), len(together)


def test_loss_is_the_mean_over_all_answer_tokens_and_leaves_no_trace(toy: tuple[Path, Path], tmp_path: Path) -> None:
    stage2.main(words(toy, tmp_path / "with", "--per_device_batch_size", "2"))
    lines = validations(tmp_path / "with")
    assert [line["step"] for line in lines] == [2, 4]
    loss, tokens = expected_loss(tmp_path / "with", toy[0])
    assert lines[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert (lines[-1]["validation_tokens"], lines[-1]["validation_samples"]) == (tokens, 3)
    run = json.loads((tmp_path / "with" / "run.json").read_text())
    assert run["validation"]["validation_loss"] == lines[-1]["validation_loss"]
    assert "validation_data" in run["inputs"]

    plain = toy_task.stage_words("stage2", *toy)
    stage2.main([*plain, "--output_dir", str(tmp_path / "without"), "--per_device_batch_size", "2"])
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_answers_are_written_once_a_validation(toy: tuple[Path, Path], tmp_path: Path) -> None:
    stage2.main(words(toy, tmp_path / "out", "--validation_answers", "2"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    assert lines[0]["expected"].strip() == "red"
    assert lines[0]["question"].count("<image>") == 1
    assert "what color is it?" in lines[0]["question"]
    assert lines[0]["record"] != lines[1]["record"]
    assert all(isinstance(line["answer"], str) for line in lines)


def test_two_processes_find_what_one_finds(toy: tuple[Path, Path], tmp_path: Path) -> None:
    stage2.main(words(toy, tmp_path / "one"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", toy_task.script("stage2")]
    done = toy_task.launch([*launcher, *words(toy, tmp_path / "two", "--per_device_batch_size", "1")])
    assert done.returncode == 0, done.stderr
    one, two = validations(tmp_path / "one"), validations(tmp_path / "two")
    assert [line["validation_tokens"] for line in two] == [line["validation_tokens"] for line in one]
    assert [line["validation_loss"] for line in two] == pytest.approx(
        [line["validation_loss"] for line in one], rel=1e-3
    )
    answers = (tmp_path / "two" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == len((tmp_path / "one" / "answers.jsonl").read_text().splitlines()) == 6


def test_mistakes_are_named_before_anything_is_written(toy: tuple[Path, Path], tmp_path: Path) -> None:
    plain = [*toy_task.stage_words("stage2", *toy), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="validation_steps: set, but there is no validation_data"):
        stage2.main([*plain, "--validation_steps", "2"])
    missing = json.loads((toy[0] / "held.json").read_text())
    missing[0]["image"] = "absent.png"
    (tmp_path / "held.json").write_text(json.dumps(missing))
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        stage2.main([*plain, "--validation_data", str(tmp_path / "held.json"), "--on_bad_sample", "skip"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", [[], ["--lora_rank", "2"]])
def test_a_step_of_stage_2_is_replayed(
    toy: tuple[Path, Path],
    tmp_path: Path,
    extra: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given, **options: torch.tensor(float("inf")))
    with pytest.raises(NonFiniteLossError):
        stage2.main([*toy_task.stage_words("stage2", *toy), "--output_dir", str(tmp_path / "out"), *extra])
    folder = tmp_path / "out" / "nonfinite" / "step-000001"
    capsys.readouterr()
    replay.main([str(folder), "--cpu", "true"])
    loss = json.loads((folder / "nonfinite.json").read_text())["loss"]
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(float(loss), rel=1e-5)
