"""`defocus-mllm merge`: what it writes gives the adapter's logits, and what it cannot prove it does not write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from defocus_mllm import merge_cli
from defocus_mllm.adapter_base import describe_base, write_base_record
from defocus_mllm.adapters import add_lora, save_adapter
from defocus_mllm.cli import build_parser
from defocus_mllm.loading import CheckpointError


def merge(adapter: Path, output: Path) -> None:
    arguments = build_parser().parse_args(["merge", str(adapter), "--output", str(output)])
    arguments.run(arguments)


@pytest.fixture
def adapter(model, processor, tmp_path: Path) -> Path:
    """An adapter far from 0 on the model in `tmp_path / base`."""
    base = tmp_path / "base"
    for part in (model, processor):
        part.save_pretrained(base)
    adapted = add_lora(AutoModelForImageTextToText.from_pretrained(base), processor, vision=True)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    save_adapter(adapted, tmp_path / "adapter")
    write_base_record(tmp_path / "adapter", describe_base(base))
    return tmp_path / "adapter"


def test_the_merged_model_is_the_adapted_one(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge(adapter, tmp_path / "merged")
    shown = capsys.readouterr()
    assert "of the largest at most" in shown.out
    assert shown.err == ""
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    adapted = AutoModelForImageTextToText.from_pretrained(adapter).eval()
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    inputs = merge_cli.random_inputs(merged)
    expected = merge_cli.logits_of(adapted, inputs)
    rounding = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(merge_cli.logits_of(merged, inputs), expected, rtol=0, atol=rounding)
    assert (merge_cli.logits_of(base, inputs) - expected).abs().max() > 0.1, "the adapter changes nothing"
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_token == "<image>"


def test_a_merge_that_changes_the_logits_writes_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    def unmerged(model: PeftModel):
        return model.unload()  # forgets the adapter

    monkeypatch.setattr(PeftModel, "merge_and_unload", unmerged, raising=False)
    with pytest.raises(ValueError, match="the merged model gives other logits than the adapter on its base model"):
        merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_files_that_do_not_give_the_merged_model_are_not_kept(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*arguments, **options):
        return AutoModelForImageTextToText.from_pretrained(tmp_path / "base")

    monkeypatch.setattr(merge_cli, "load_strictly", other)
    with pytest.raises(ValueError, match="read from its files gives other logits"):
        merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_model_that_has_changed_is_refused(adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] += 1e-3
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="has other weights or files than when"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_is_not_known_or_not_the_same_is_said(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base_record(adapter, describe_base(tmp_path / "base", "nf4"))
    merge(adapter, tmp_path / "merged")
    assert "note: the adapter was trained on nf4 weights" in capsys.readouterr().err
    (adapter / "base_model.json").unlink()
    merge(adapter, tmp_path / "again")
    assert "so whether it was trained on" in capsys.readouterr().err


def test_settings_of_generation_come_from_the_adapter(adapter: Path, tmp_path: Path) -> None:
    """Training may have given the model another chat template, and with it another end of turn."""
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    merge(adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [1, 7]


@pytest.mark.parametrize(
    ("damage", "error"), [("adapter", FileNotFoundError), ("weights", CheckpointError), ("record", ValueError)]
)
def test_damage_is_named(adapter: Path, tmp_path: Path, damage: str, error: type[Exception]) -> None:
    if damage == "adapter":
        (adapter / "adapter_config.json").unlink()
    elif damage == "weights":
        weights = load_file(adapter / "adapter_model.safetensors")
        weights.pop(next(iter(weights)))
        save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    else:
        (adapter / "base_model.json").write_text("{}")
    with pytest.raises(error, match="adapter"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nothing_is_overwritten(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        merge(adapter, tmp_path / "base")
