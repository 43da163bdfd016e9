"""Stage 0 from an earlier run: another resolution, other classes, and what it says about both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from defocus_mllm import DefocusForImageClassification, DefocusImageProcessor, DefocusVisionConfig, DefocusVisionModel
from training.starting_point import kept_rows, load_start, starting_config

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
NAMES = ["ant", "bee", "cat", "dog"]


def with_labels(config: DefocusVisionConfig, names: list[str]) -> DefocusVisionConfig:
    config.id2label = dict(enumerate(names))
    return config


def save(folder: Path, names: list[str] = NAMES, **fields: Any) -> DefocusForImageClassification:
    config = DefocusVisionConfig(**{"image_size": 16, "patch_size": 8, **SIZES, **fields})
    model = DefocusForImageClassification(with_labels(config, names))
    model.save_pretrained(folder)
    DefocusImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


def start(folder: Path, names: list[str], **changes: Any) -> tuple[DefocusForImageClassification, list[str]]:
    model = DefocusForImageClassification(with_labels(starting_config(str(folder), changes), names))
    return model, load_start(model, str(folder))


@pytest.mark.parametrize("mixer", ["attention", "retention", "mamba"])
@pytest.mark.parametrize("decay", ["learnable", "fixed"])
def test_the_same_task_continues_with_the_same_model(tmp_path: Path, mixer: str, decay: str) -> None:
    saved = save(tmp_path, mixer=mixer, decay=decay).eval()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    saved.save_pretrained(tmp_path)
    model, lines = start(tmp_path, NAMES)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(pixels).logits, saved(pixels).logits)
    assert torch.equal(model(pixels).aux_logits, saved(pixels).aux_logits)
    assert lines == [
        f"model: encoder of {tmp_path}",
        "model: head keeps 4 of 4 classes (the checkpoint has 4)",
        "model: head2 keeps 4 of 4 classes (the checkpoint has 4)",
    ]


def test_another_resolution(tmp_path: Path) -> None:
    saved = save(tmp_path, mixer="mamba", delta_scale_factor=1.5, use_absolute_position_embeddings=True)
    model, lines = start(tmp_path, NAMES, image_size=32)
    assert (model.config.image_size, model.config.delta_scale_factor, model.config.rope_scale_factor) == (32, 3.0, 4.0)
    assert "32 instead of 16 pixels" in lines[0]
    expected = saved.encoder
    expected.resize_images(32)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval().encoder(pixels)[0], expected.eval()(pixels)[0])
    explicit, _ = start(tmp_path, NAMES, image_size=32, rope_scale_factor=7.0)
    assert (explicit.config.delta_scale_factor, explicit.config.rope_scale_factor) == (3.0, 7.0)


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_classes_of_the_same_name_keep_their_rows(tmp_path: Path, head_type: str) -> None:
    saved = save(tmp_path, head_type=head_type)
    model, lines = start(tmp_path, ["cat", "eel", "ant"])
    assert lines[1:] == [f"model: {head} keeps 2 of 3 classes (the checkpoint has 4)" for head in ("head", "head2")]
    features = torch.randn(5, 32)
    for name in ("head", "head2"):
        old, new = getattr(saved, name)(features), getattr(model, name)(features)
        assert torch.allclose(new[:, [0, 2]], old[:, [2, 0]], atol=1e-6)
        assert not torch.allclose(new[:, 1], old[:, 1], atol=1e-3)


def test_other_classes_get_a_new_head(tmp_path: Path) -> None:
    saved = save(tmp_path)
    model, lines = start(tmp_path, ["fox", "gnu"])
    assert lines[1] == "model: head is new: 2 classes instead of 4, none of the same name"
    assert not torch.equal(model.head.weight, saved.head.weight[:2])
    assert torch.equal(model.encoder.norm.weight, saved.encoder.norm.weight)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (["a", "b"], ["a", "b"], [(0, 0), (1, 1)]),
        (["a", "b", "c"], ["c", "x", "a"], [(0, 2), (2, 0)]),
        (["LABEL_0", "LABEL_1"], ["tench", "goldfish"], [(0, 0), (1, 1)]),  # a converted release
        (["0", "1"], ["0", "1"], [(0, 0), (1, 1)]),
        (["0", "1", "2"], ["0", "1"], []),  # numbers of other data mean other classes
        (["a", "b"], ["c", "d"], []),
    ],
)
def test_which_rows_are_kept(old: list[str], new: list[str], expected: list[tuple[int, int]]) -> None:
    assert kept_rows(old, new) == expected


def test_heads_that_the_checkpoint_lacks_are_new(tmp_path: Path) -> None:
    save(tmp_path / "plain", aux_loss="none")
    _, lines = start(tmp_path / "plain", NAMES, aux_loss="per_token")
    assert "head keeps 4" in lines[1]
    assert lines[2] == "model: head2 is new: the checkpoint has none"
    _, lines = start(tmp_path / "plain", NAMES, head_type="mlp")
    assert "another type (head_type)" in lines[1]


def test_an_encoder_without_heads_will_do(tmp_path: Path) -> None:
    saved = DefocusVisionModel(DefocusVisionConfig(image_size=16, patch_size=8, **SIZES))
    saved.save_pretrained(tmp_path)
    DefocusImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model, lines = start(tmp_path, NAMES)
    assert torch.equal(model.encoder.norm.weight, saved.norm.weight)
    assert torch.equal(model.encoder.embeddings.patch_embed.weight, saved.embeddings.patch_embed.weight)
    assert "is new" in lines[1]


def test_fields_that_do_not_fit_the_weights_are_named(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ValueError, match=r"vision_config: .* do not fit the encoder of .*patch_embed"):
        start(tmp_path, NAMES, patch_size=4)
    with pytest.raises(ValueError, match='leave out "preset"'):
        start(tmp_path, NAMES, preset="defocus_vit_tiny")


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model: .* holds no saved model"):
        starting_config(str(tmp_path), {})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="holds a 'llama', not a De-focus encoder"):
        starting_config(str(tmp_path), {})
    save(tmp_path / "encoder")
    (tmp_path / "encoder" / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json"):
        starting_config(str(tmp_path / "encoder"), {})
