"""Activations computed a second time: the same gradients from less than half of the memory, for every model."""

import copy

import pytest
import torch
from torch import nn

from defocus_mllm import (
    DefocusCLIPConfig,
    DefocusCLIPModel,
    DefocusConfig,
    DefocusForConditionalGeneration,
    DefocusForImageClassification,
    DefocusVisionConfig,
)
from defocus_mllm.mixers_defocus import MIXERS

DEEP = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 32}
MAMBA = {"state_size": 4, "time_step_rank": 2, "group_norm_size": 16}
IMAGE = 3  # the image token's id


def vision_config(mixer, side=72, **fields):
    return DefocusVisionConfig(image_size=side, patch_size=8, mixer=mixer, **{**DEEP, **MAMBA, **fields})


def step(model: nn.Module, inputs):
    """Gradients, and the bytes that the forward pass keeps for the backward pass; parameters do not count."""
    torch.manual_seed(1)
    model.zero_grad()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).loss
    size = sum(kept.values())
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, size


def assert_same_gradients_from_less(model, inputs):
    plain = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    expected, kept_by_plain = step(plain, inputs)
    gradients, kept = step(model, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
    assert 0 < kept < kept_by_plain / 2


@pytest.mark.parametrize("mixer", MIXERS)
def test_of_a_classifier_drop_path_included(mixer):
    config = vision_config(mixer, drop_path_rate=0.5, num_labels=3)
    inputs = {"pixel_values": torch.randn(4, 3, 72, 72), "labels": torch.tensor([0, 2, 1, 1])}
    assert_same_gradients_from_less(DefocusForImageClassification(config).train(), inputs)


@pytest.mark.parametrize("mixer", MIXERS)
def test_of_vision_tower_and_language_model(mixer):
    text = {"model_type": "llama", "vocab_size": 30, "attention_dropout": 0.2, **DEEP}
    config = DefocusConfig(vision_config=vision_config(mixer, 48), text_config=text, image_token_id=IMAGE)
    model = DefocusForConditionalGeneration(config).train()
    ids = torch.randint(5, 30, (2, 50))
    ids[:, 2 : 2 + config.num_image_tokens] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    inputs = {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(2, 3, 48, 48), "use_cache": False}
    for part in (model.model.vision_tower, model.model.language_model):
        alone = step(model, inputs)[1]
        part.activation_checkpointing_enable()
        assert step(model, inputs)[1] < 0.8 * alone, type(part).__name__
        part.activation_checkpointing_disable()
    assert_same_gradients_from_less(model, inputs)


def test_of_a_contrastive_model():
    text = {"model_type": "clip_text_model", "vocab_size": 30, "eos_token_id": 2, "bos_token_id": 1, **DEEP}
    config = DefocusCLIPConfig(vision_config=vision_config("attention"), text_config=text, projection_dim=8)
    inputs = {"input_ids": torch.randint(4, 30, (3, 60)), "pixel_values": torch.randn(3, 3, 72, 72)}
    assert_same_gradients_from_less(DefocusCLIPModel(config).train(), {**inputs, "return_loss": True})


def test_of_a_compiled_encoder():
    config = vision_config("attention", num_labels=3, num_hidden_layers=4)
    model = DefocusForImageClassification(config).train()
    inputs = {"pixel_values": torch.randn(4, 3, 72, 72), "labels": torch.tensor([0, 2, 1, 1])}
    expected, kept_by_plain = step(model, inputs)
    torch._dynamo.reset()
    model.activation_checkpointing_enable()
    model.compile(backend="aot_eager", fullgraph=True)
    gradients, kept = step(model, inputs)
    torch._dynamo.reset()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert 0 < kept < kept_by_plain / 2  # the compiled model alone: 0.9
