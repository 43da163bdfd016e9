"""A batch of 0 images: the encoder runs, so that processes sharing it stay in step, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusVisionConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def make(mixer: str) -> DefocusForConditionalGeneration:
    vision = DefocusVisionConfig(mixer=mixer, image_size=16, patch_size=8, **SIZES)
    text: dict[str, Any] = {"model_type": "llama", "vocab_size": 40, **SIZES}
    return DefocusForConditionalGeneration(DefocusConfig(vision_config=vision, text_config=text, image_token_id=39))


@pytest.mark.parametrize("mixer", ["attention", "retention", "mamba"])
def test_no_images_change_no_number_and_reach_every_weight(mixer: str) -> None:
    model = make(mixer)
    input_ids = torch.randint(0, 38, (2, 6))
    plain = model(input_ids=input_ids, labels=input_ids)
    shared = model(input_ids=input_ids, labels=input_ids, pixel_values=torch.zeros(0, 3, 16, 16))
    assert torch.equal(shared.logits, plain.logits)
    assert shared.image_hidden_states.shape == (0, SIZES["hidden_size"])
    shared.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if "vision_tower" in name or "projector" in name:
            assert not parameter.grad.any(), name


def test_placeholders_without_images_are_still_refused() -> None:
    model = make("attention")
    with pytest.raises(ValueError, match="image placeholders but the images give 0 tokens"):
        model(input_ids=torch.full((1, 5), 39), pixel_values=torch.zeros(0, 3, 16, 16))
