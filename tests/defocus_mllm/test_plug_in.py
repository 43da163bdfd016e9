"""The encoder as a part of Transformers' own models: each learns and answers, and drops no patch in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from defocus_mllm import DefocusVisionConfig, DefocusVisionModel

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"model_type": "llama", "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **SIZES}
IMAGE_TOKEN = 4
FULL: dict[str, Any] = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}


def vision_config(mixer: str = "attention", **fields: Any) -> DefocusVisionConfig:
    mamba = {"group_norm_size": 16, "time_step_rank": 4} if mixer == "mamba" else {}
    return DefocusVisionConfig(mixer=mixer, image_size=32, patch_size=8, **{**SIZES, **mamba, **fields})


def llava(vision: DefocusVisionConfig, **fields: Any) -> LlavaForConditionalGeneration:
    config = LlavaConfig(vision_config=vision, text_config=TEXT, image_token_index=IMAGE_TOKEN, **fields)
    return LlavaForConditionalGeneration(config)


def prompt(image_tokens: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[IMAGE_TOKEN] * image_tokens + [5, 6, 7]])}


def one_step_changes_the_encoder(model: nn.Module, encoder: nn.Module, **inputs: Any) -> None:
    """One optimiser step lowers the loss, through every parameter of the encoder."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model(**inputs).loss
    loss.backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
    assert encoder.get_parameter("embeddings.patch_embed.weight").grad.norm() > 0
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert model(**inputs).loss < loss


def same_after_saving(model: Any, folder: Path, **inputs: Any) -> None:
    model.save_pretrained(folder)
    with torch.no_grad():
        again = type(model).from_pretrained(folder).eval()(**inputs)
        assert torch.equal(again[0], model.eval()(**inputs)[0])


@pytest.mark.parametrize("mixer", ["attention", "retention", "mamba"])
def test_llava_sees_every_token_with_the_class_token_last(mixer: str, tmp_path: Path) -> None:
    model = llava(vision_config(mixer, num_registers=1), **FULL)
    encoder = model.model.vision_tower
    assert isinstance(encoder, DefocusVisionModel)
    pixels = torch.rand(1, 3, 32, 32)
    inputs = {**prompt(encoder.config.num_image_tokens), "pixel_values": pixels}
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    one_step_changes_the_encoder(model, encoder, **inputs, labels=labels)
    with torch.no_grad():
        tokens = encoder.eval()(pixels).last_hidden_state[0]
        features = model.model.get_image_features(pixels, return_dict=True).pooler_output[0]
        assert torch.equal(features, model.model.multi_modal_projector(tokens))
    answer = model.eval().generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    same_after_saving(model, tmp_path, **inputs)


@pytest.mark.parametrize("class_token", [True, False])
def test_a_llava_that_would_drop_the_first_patch_is_refused(class_token: bool) -> None:
    vision = vision_config(class_token=class_token, aux_loss="none")
    message = "LlavaConfig: vision_feature_select_strategy='default' drops the first token, which here is a patch"
    for fields in ({}, {"vision_feature_layer": -1}, {"vision_feature_select_strategy": "default"}):
        with pytest.raises(ValueError, match=message):
            llava(vision, **fields)


def test_other_models_that_would_drop_the_first_patch_are_refused() -> None:
    vision = vision_config()
    next_config = LlavaNextConfig(vision_config=vision, text_config=TEXT)
    with pytest.raises(ValueError, match="LlavaNextConfig: vision_feature_select_strategy='default'"):
        LlavaNextForConditionalGeneration(next_config)
    onevision = LlavaOnevisionConfig(
        vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, vision_feature_select_strategy="default"
    )
    with pytest.raises(ValueError, match="LlavaOnevisionConfig: vision_feature_select_strategy='default'"):
        LlavaOnevisionForConditionalGeneration(onevision)
    with pytest.raises(ValueError, match="VipLlavaConfig: this model always drops the first token"):
        VipLlavaForConditionalGeneration(VipLlavaConfig(vision_config=vision, text_config=TEXT))


def test_an_encoder_put_into_a_finished_llava_is_looked_at_too() -> None:
    clip = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **SIZES}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=clip, text_config=TEXT))
    with pytest.raises(ValueError, match="drops the first token"):
        model.model.vision_tower = DefocusVisionModel(vision_config())


def test_the_processor_of_llava_counts_the_tokens(tokenizer: Any) -> None:
    from PIL import Image

    from defocus_mllm import DefocusImageProcessor

    vision = vision_config(num_registers=2)
    processor = LlavaProcessor(
        DefocusImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=vision.num_image_tokens - vision.num_patches,
    )
    inputs = processor(images=Image.new("RGB", (40, 50)), text="<image>is it red?", return_tensors="pt")
    assert (inputs["input_ids"] == tokenizer.image_token_id).sum() == vision.num_image_tokens


def onevision(vision: DefocusVisionConfig) -> LlavaOnevisionForConditionalGeneration:
    tokens = {"image_token_index": IMAGE_TOKEN, "video_token_index": 3, "image_grid_pinpoints": [[32, 64]]}
    text = {**TEXT, "model_type": "qwen2", "num_key_value_heads": 2}
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(vision_config=vision, text_config=text, **tokens)
    )


TILES = {"pixel_values": torch.rand(1, 3, 3, 32, 32), "image_sizes": torch.tensor([[32, 64]])}


def test_llava_onevision_arranges_the_patches_of_tiles(tmp_path: Path) -> None:
    model = onevision(vision_config(class_token=False, aux_loss="none"))
    with torch.no_grad():
        count = len(model.get_image_features(**TILES, return_dict=True).pooler_output[0])
    assert count == 16 + 4 * (8 + 1)  # the whole image, and four rows of both halves with an end each
    inputs = {**prompt(count), **TILES}
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    one_step_changes_the_encoder(model, model.model.vision_tower, **inputs, labels=labels)
    answer = model.eval().generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == count + 3 + 3
    same_after_saving(model, tmp_path, **inputs)


def test_llava_onevision_refuses_a_class_token() -> None:
    model = onevision(vision_config())
    with pytest.raises(ValueError, match="number of patches is not consistent"):
        model.get_image_features(**TILES, return_dict=True)


def test_patches_do_not_need_the_class_token_they_were_trained_with(tmp_path: Path) -> None:
    encoder = DefocusVisionModel(vision_config("mamba", use_absolute_position_embeddings=False)).eval()
    encoder.save_pretrained(tmp_path)
    patches = DefocusVisionModel.from_pretrained(tmp_path, class_token=False, aux_loss="none").eval()
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(pixels).last_hidden_state[:, :-1]
        torch.testing.assert_close(patches(pixels).last_hidden_state, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mixer", ["attention", "retention", "mamba"])
def test_a_dual_encoder_compares_class_tokens_with_texts(mixer: str, tmp_path: Path) -> None:
    text = {"model_type": "bert", "vocab_size": 50, **SIZES}
    config = VisionTextDualEncoderConfig(vision_config=vision_config(mixer), text_config=text, projection_dim=16)
    model = VisionTextDualEncoderModel(config).eval()
    inputs = {"pixel_values": torch.rand(3, 3, 32, 32), "input_ids": torch.randint(5, 50, (3, 6))}
    one_step_changes_the_encoder(model, model.vision_model, **inputs, return_loss=True)
    with torch.no_grad():
        outputs = model(**inputs)
        class_tokens = model.vision_model(inputs["pixel_values"]).last_hidden_state[:, -1]
        expected = nn.functional.normalize(model.visual_projection(class_tokens), dim=-1)
    assert outputs.logits_per_image.shape == (3, 3)
    torch.testing.assert_close(outputs.image_embeds, expected)
    same_after_saving(model, tmp_path, **inputs)


def test_a_classifier_by_its_auto_class(tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_config(vision_config(num_labels=3))
    inputs = {"pixel_values": torch.rand(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0])}
    one_step_changes_the_encoder(model, model.encoder, **inputs)
    assert set(model(inputs["pixel_values"]).logits.argmax(-1).tolist()) <= {0, 1, 2}
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(inputs["pixel_values"]).logits, model(inputs["pixel_values"]).logits)
