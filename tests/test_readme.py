"""The Python in the README and the guides runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from defocus_mllm import DefocusForImageClassification, DefocusVisionConfig
from defocus_mllm.cache_defocus import CACHE_NAME

ROOT = Path(__file__).resolve().parents[1]


def python_blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def python_block(containing: str, page: str = "README.md") -> str:
    (block,) = (block for block in python_blocks(page) if containing in block)
    return block


def run(block: str, page: str = "README.md") -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "documentation"}
    exec(compile(block, page, "exec"), names)
    return names


def test_a_trained_model_answers(
    model, processor, image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "data" / "easy_vqa" / "images" / "train"
    pictures.mkdir(parents=True)
    image.save(pictures / "0.png")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "outputs" / "quickstart" / "stage2")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    run(python_block("AutoModelForImageTextToText"))
    assert capsys.readouterr().out.strip()


def test_the_encoder_is_causal_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    run(python_block("DefocusVisionModel"))
    upper_half, class_token = (float(value) for value in re.findall(r"tensor\(([^)]*)\)", capsys.readouterr().out))
    assert upper_half == 0
    assert class_token > 1e-3


def test_the_examples_of_the_encoder_guide_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    pieces, resized, backends = python_blocks("docs/encoder.md")
    run(pieces, "docs/encoder.md")
    (difference,) = re.findall(r"tensor\(([^,)]*)", capsys.readouterr().out)
    assert float(difference) < 1e-12
    run(resized, "docs/encoder.md")
    assert capsys.readouterr().out.split() == ["2.0", "4.0"]
    run(backends, "docs/encoder.md")
    assert "'folded'" in capsys.readouterr().out


def test_every_example_of_the_dense_guide_uses_the_trained_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = DefocusForImageClassification(DefocusVisionConfig.from_preset("defocus_vit_tiny", num_labels=3))
    classifier.save_pretrained(tmp_path / "outputs" / "quickstart" / "stage0_vision")
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks("docs/dense.md")
    assert len(blocks) == 3
    for block in blocks:
        names = run(block, "docs/dense.md")
        trained = names["backbone"].encoder.embeddings.patch_embed.weight
        distance = (trained - classifier.encoder.embeddings.patch_embed.weight).abs().max()
        if "loss" in names:
            assert names["loss"].isfinite()
            assert 0 < distance < 2e-4, "one step of AdamW with a rate of 1e-4"
        else:
            assert distance == 0
            assert names["backbone"].config.rope_scale_factor == 4


def test_the_examples_of_the_streaming_guide_do_what_they_say(
    model, processor, image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "data" / "easy_vqa" / "images" / "train"
    pictures.mkdir(parents=True)
    image.save(pictures / "0.png")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "outputs" / "quickstart" / "stage2")
    monkeypatch.chdir(tmp_path)
    stream, pieces, bounded = python_blocks("docs/streaming.md")
    names = run(stream, "docs/streaming.md")
    content = [{"type": "image", "image": image}, {"type": "text", "text": names["question"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    whole = names["model"].generate(**inputs, max_new_tokens=16, do_sample=False)
    assert whole[:, inputs["input_ids"].shape[1] :].tolist() == names["answer"].tolist()

    capsys.readouterr()
    run(pieces, "docs/streaming.md")
    nothing, difference = capsys.readouterr().out.splitlines()
    assert nothing == "None"
    assert float(re.findall(r"tensor\(([^,)]*)", difference)[0]) < 1e-5
    run(bounded, "docs/streaming.md")
    sizes, bounds = capsys.readouterr().out.splitlines()
    assert f"# {sizes}, and no more for later frames" in bounded
    assert [float(bound) for bound in re.findall(r"[\d.e+-]+\d", bounds)][-1] == 0


def test_the_examples_of_the_generation_guide_answer_every_row_and_turn(
    model, processor, image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tmp_path / "data" / "easy_vqa" / "images" / "train"
    pictures.mkdir(parents=True)
    image.save(pictures / "0.png")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "outputs" / "quickstart" / "stage2")
    monkeypatch.chdir(tmp_path)
    chats, turns = python_blocks("docs/generation.md")
    names = run(chats, "docs/generation.md")
    assert len(names["answers"]) == 3
    assert len(names["inputs"]["pixel_values"]) == 2 + 4
    if CACHE_NAME == "past_key_values":
        turns = turns.replace("cache=first_turn.cache", "past_key_values=first_turn.past_key_values")
    exec(compile(turns, "docs/generation.md", "exec"), names)
    assert names["second_turn"].shape[1] > names["ids"].shape[1]


def test_every_example_of_the_plug_in_guide_answers() -> None:
    blocks = python_blocks("docs/plug_in.md")
    assert len(blocks) == 4
    for block in blocks:
        names = run(block, "docs/plug_in.md")
        assert names["answer"].numel() > 0
        if "words" in names:
            assert 1 <= names["answer"].shape[1] - names["words"].shape[1] <= 3


def test_the_examples_of_the_ecosystem_guide_run_one_after_the_other(datasets_cache) -> None:
    pytest.importorskip("trl", reason="needs the trl extra: pip install -e '.[trl]'")
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in python_blocks("docs/ecosystem.md"):
        exec(compile(block, "docs/ecosystem.md", "exec"), names)
    assert isinstance(names["answer"], str)
    inputs = names["processor"].apply_chat_template(names["chat"], tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        merged = names["merged"](**inputs).logits
        assert torch.allclose(names["adapted"](**inputs).logits, merged, atol=1e-5)
    assert (names["folder"] / "merged" / "modeling_defocus.py").is_file()
    assert names["trainer"].state.global_step == 3
