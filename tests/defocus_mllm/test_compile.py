"""torch.compile takes every model as one graph that computes what eager mode does, for all batch sizes and rates."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

from defocus_mllm import (
    DefocusCLIPConfig,
    DefocusCLIPModel,
    DefocusConfig,
    DefocusForConditionalGeneration,
    DefocusForImageClassification,
    DefocusVisionConfig,
    DefocusVisionModel,
)
from defocus_mllm.mixers_defocus import MIXERS

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MAMBA = {"state_size": 4, "time_step_rank": 2, "group_norm_size": 16}
SIDE = 72  # 81 patches: more than a chunk of retention
IMAGE = 3  # the image token's id


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def vision_config(mixer="attention", side=SIDE, **fields):
    return DefocusVisionConfig(image_size=side, patch_size=8, mixer=mixer, **{**WIDTHS, **MAMBA, **fields})


def build_multimodal(mixer="attention"):
    text = {"model_type": "llama", "vocab_size": 30, **WIDTHS, "num_hidden_layers": 1}
    vision = vision_config(mixer, 16, num_hidden_layers=1)
    config = DefocusConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return DefocusForConditionalGeneration(config)


def conversations(batch, words):
    """An image of 5 tokens and some words a row, the first row padded on the left."""
    ids = torch.randint(5, 30, (batch, 7 + words))
    ids[:, 2:7] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE), -100)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(batch, 3, 16, 16),
        "labels": labels,
    }


def compiled(model):
    """A copy with the same parameters in a compiled state, and what counts its graphs. Breaks are allowed, to count."""
    counter = CompileCounterWithBackend("aot_eager")
    model = copy.deepcopy(model)
    model.compile(backend=counter)
    return model, counter


def assert_one_graph(counter, graphs=1):
    assert dict(torch._dynamo.utils.counters["graph_break"]) == {}
    assert counter.frame_count == graphs


def step(model, inputs):
    """Loss and gradients, from the same random numbers every time."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_step(ours, reference, inputs):
    loss, gradients = step(ours, inputs)
    expected_loss, expected = step(reference, inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            tolerance = 1e-6 + 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_encoder_is_one_graph_for_all_batch_sizes(mixer):
    model = DefocusVisionModel(vision_config(mixer)).eval()
    ours, counter = compiled(model)
    with torch.no_grad():
        for batch in (3, 2, 5, 4):
            pixels = torch.randn(batch, 3, SIDE, SIDE)
            outputs, expected = ours(pixels), model(pixels)
            torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    assert_one_graph(counter, 2)  # one for the first size, one for any


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_a_classifier_is_one_graph(mixer):
    config = vision_config(mixer, drop_path_rate=0.5, aux_loss="pooled", num_labels=3)
    model = DefocusForImageClassification(config).train()
    ours, counter = compiled(model)
    inputs = {"pixel_values": torch.randn(4, 3, SIDE, SIDE), "labels": torch.tensor([0, 2, -1, 1])}
    assert_same_step(ours, model, inputs)
    assert_one_graph(counter)


def test_batch_size_and_drop_path_rate_are_numbers_of_the_graph():
    model = DefocusForImageClassification(vision_config(side=16, num_labels=3)).train()
    ours, counter = compiled(model)
    for batch, rate in ((4, 0.1), (3, 0.2), (2, 0.3), (6, 0.4), (5, 0.5), (7, 0.6), (9, 0.7), (8, 0.8), (10, 0.9)):
        ours.set_drop_path_rate(rate)
        model.set_drop_path_rate(rate)
        inputs = {"pixel_values": torch.randn(batch, 3, 16, 16), "labels": torch.arange(batch) % 3}
        assert_same_step(ours, model, inputs)
    assert_one_graph(counter, 2)


def test_contrastive_model_is_one_graph():
    text = {"model_type": "clip_text_model", "vocab_size": 30, "eos_token_id": 2, "bos_token_id": 1, **WIDTHS}
    config = DefocusCLIPConfig(vision_config=vision_config(side=16), text_config=text, projection_dim=8)
    model = DefocusCLIPModel(config).train()
    with torch.no_grad():
        model.logit_scale.fill_(5.0)  # above its range: the model puts it back
    ours, counter = compiled(model)
    mask = torch.arange(6) < torch.tensor([[6], [3], [4]])
    inputs = {"input_ids": torch.randint(4, 30, (3, 6)), "attention_mask": mask.long(), "return_loss": True}
    assert_same_step(ours, model, {**inputs, "pixel_values": torch.randn(3, 3, 16, 16)})
    assert ours.logit_scale == model.logit_scale < 5
    assert_one_graph(counter)


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_the_language_model_on_images_is_one_graph(mixer):
    model = build_multimodal(mixer).train()
    ours, counter = compiled(model)
    assert_same_step(ours, model, {**conversations(3, 4), "num_items_in_batch": 11, "use_cache": False})
    assert_one_graph(counter)


def test_lengths_batch_sizes_and_numbers_of_items_are_numbers_of_the_graph():
    model = build_multimodal().train()
    ours, counter = compiled(model)
    for batch, words, items in ((4, 4, 20), (3, 6, 30), (2, 7, 18), (6, 3, 7), (5, 9, 40), (4, 2, 12)):
        assert_same_step(ours, model, {**conversations(batch, words), "num_items_in_batch": items, "use_cache": False})
    assert_one_graph(counter, 2)  # one for the first shape, one for any


def test_prefill_is_one_graph_fills_the_cache_and_refuses_what_does_not_fit():
    model = build_multimodal().eval()
    ours, counter = compiled(model)
    inputs = {name: tensor for name, tensor in conversations(2, 4).items() if name != "labels"}
    following = {"input_ids": torch.full((2, 1), 7), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    logits = []
    with torch.no_grad():
        for which in (model, ours):
            cache = DynamicCache(config=model.config.text_config)
            first = which(**inputs, past_key_values=cache, logits_to_keep=1).logits
            logits.append(torch.cat([first, model(**following, past_key_values=cache).logits]))
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
        inputs["input_ids"][1, 4] = 9
        with pytest.raises(RuntimeError, match="use one <image> per image"):
            ours(**inputs, past_key_values=DynamicCache(config=model.config.text_config), logits_to_keep=1)
    assert_one_graph(counter)


def test_the_tracer_explains_no_break():
    with torch.no_grad():
        explanation = torch._dynamo.explain(build_multimodal().eval())(**conversations(2, 4))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0), explanation.break_reasons


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler on the CPU, and there is no g++")
def test_inductor_trains_what_eager_mode_does():
    model = DefocusForImageClassification(vision_config(side=16, num_labels=2, num_hidden_layers=1)).train()
    ours = copy.deepcopy(model)
    ours.compile(fullgraph=True)
    assert_same_step(ours, model, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])})
