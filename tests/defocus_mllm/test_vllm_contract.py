"""What vLLM's Transformers back end does with a multimodal model, done here without vLLM, which cannot be installed.

Each test names the place in vLLM (`vllm/model_executor/models/transformers/`, main branch, November 2026) that asks for
it. Not run: vLLM itself, its kernels, fusers, scheduler and weight loader, and more than one device.
"""

import json

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoProcessor
from transformers.modeling_outputs import ModelOutput

from defocus_mllm import DefocusModel

MIXERS = ["attention", "retention", "mamba"]
# utils.py, replace_linear_class; any other style is "replicate".
STYLES_OF_VLLM = {"colwise", "colwise_rep", "rowwise", "rowwise_rep", "replicate"}
SEEN: list[tuple[int, object]] = []


def attention_of_vllm(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """__init__.py, vllm_attention_forward: finds its cache by the layer's number, and masks by itself."""
    SEEN.append((module.layer_idx, attention_instances[module.layer_idx]))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return mixed.transpose(1, 2).reshape(-1, query.shape[1] * query.shape[-1]), None


AttentionInterface.register("vllm_stand_in", attention_of_vllm)


class Replaced(nn.Module):
    """Stands for vLLM's layers, which are other classes; its convolution has a weight, a quantised linear none."""

    def __init__(self, original):
        super().__init__()
        self.compute = lambda inputs: original(inputs)
        if isinstance(original, nn.Conv2d):
            self.weight = original.weight

    def forward(self, inputs):
        return self.compute(inputs)


def replace_layers(module):
    """base.py, recursive_replace: exchanges every linear layer and two-dimensional convolution."""
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | nn.Conv2d):
            setattr(module, name, Replaced(child))
            replaced += 1
        else:
            replaced += replace_layers(child)
    return replaced


@pytest.fixture
def folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def base(folder):
    return AutoModel.from_pretrained(folder).eval()


@pytest.fixture
def inputs(processor, image):
    text = "<image>\nis there a red circle in the image?"
    return processor(text=[text], images=[image], return_tensors="pt")


def test_the_auto_class_gives_the_base_model_and_knows_where_its_code_is(folder):
    """base.py, Base.__init__: AutoModel.from_config(config, dtype=..., trust_remote_code=...)."""
    assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_defocus.DefocusModel"
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    assert type(model) is DefocusModel
    assert type(model).is_backend_compatible()


@pytest.mark.parametrize("mixer", MIXERS)
def test_only_parameters_lie_on_meta_and_the_weights_fill_them(mixer, model, base, inputs):
    """utils.py, init_on_device_without_buffers; base.py, init_parameters."""
    model.config.vision_config.mixer = mixer
    model.config.vision_config.decay = None
    config = type(model.config).from_dict(model.config.to_dict())
    expected = AutoModel.from_config(config).eval()
    with init_empty_weights(include_buffers=False):
        empty = AutoModel.from_config(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())
    empty.load_state_dict(expected.state_dict(), assign=True)
    pixels = inputs["pixel_values"]
    given = empty.eval().get_image_features(pixels).pooler_output[0]
    assert torch.equal(given, expected.get_image_features(pixels).pooler_output[0])


def test_parts_have_the_names_by_which_they_are_found(base):
    """multimodal.py, _find_encoder_classes, get_language_model, get_mm_mapping; base.py, _get_decoder_cls."""
    assert type(base.get_encoder(modality="image")) is not type(base)
    assert base.get_encoder(modality="image") is base.vision_tower
    assert base.get_decoder() is base.language_model
    assert base.base_model_prefix == "model"
    assert base.config.get_text_config() is base.config.text_config
    assert base.config.text_config.vocab_size == base.get_input_embeddings().weight.shape[0]


def test_weights_are_named_by_the_base_model_and_the_head(model):
    """base.py, _create_hf_to_vllm_mapper: `model.` and `lm_head.` only."""
    assert {name.split(".")[0] for name in model.state_dict()} == {"model", "lm_head"}


def test_the_embedding_can_be_exchanged(base, inputs):
    """base.py, Base.__init__: set_input_embeddings(VocabParallelEmbedding(...))."""
    expected = base(**inputs).last_hidden_state
    old = base.get_input_embeddings()
    new = nn.Embedding(*old.weight.shape)
    new.load_state_dict(old.state_dict())
    base.set_input_embeddings(new)
    assert base.get_input_embeddings() is new is base.language_model.get_input_embeddings()
    assert torch.equal(base(**inputs).last_hidden_state, expected)


def test_every_layer_of_text_gets_its_attention_instance_and_hidden_states_come_first(base, inputs):
    """base.py, forward; multimodal.py, embed_multimodal: images are merged by vLLM and no ids are given."""
    expected = base(**inputs).last_hidden_state
    images = base.get_image_features(inputs["pixel_values"]).pooler_output
    embeds = base.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == base.config.image_token_id] = torch.cat(images)
    base.config.text_config._attn_implementation = "vllm_stand_in"
    SEEN.clear()
    instances = {layer: object() for layer in range(base.config.text_config.num_hidden_layers)}
    outputs = base(
        input_ids=None,
        inputs_embeds=embeds,
        use_cache=False,
        position_ids=torch.arange(embeds.shape[1])[None],
        attention_instances=instances,
        return_dict=False,
    )
    assert list(instances.items()) == SEEN
    torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)
    # base.py, _get_attn_cls: `is_causal=False` marks an encoder.
    assert all(getattr(module, "is_causal", True) for module in base.language_model.modules())


@pytest.mark.parametrize("mixer", MIXERS)
def test_linear_layers_and_convolutions_can_be_exchanged(mixer, model, inputs):
    """base.py, recursive_replace: nothing may read the weight of a layer that it does not own."""
    model.config.vision_config.mixer = mixer
    model.config.vision_config.decay = None
    base = AutoModel.from_config(type(model.config).from_dict(model.config.to_dict())).eval()
    expected = base(**inputs).last_hidden_state
    assert replace_layers(base) > 10
    torch.testing.assert_close(base(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_rates_in_16_bits_still_compute(mixer, model, inputs):
    """base.py, init_parameters: every parameter that vLLM does not exchange gets vLLM's number format."""
    model.config.vision_config.mixer = mixer
    model.config.vision_config.decay = None
    base = AutoModel.from_config(type(model.config).from_dict(model.config.to_dict())).eval()
    pixels = inputs["pixel_values"]
    expected = base.get_image_features(pixels).pooler_output[0]
    for parameter in base.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    tokens = base.get_image_features(pixels.to(torch.bfloat16)).pooler_output[0].float()
    assert (tokens - expected).norm() < 0.1 * expected.norm()


def test_an_image_gives_one_tensor_of_as_many_tokens_as_the_processor_counts(base, processor, inputs):
    """multimodal.py, _get_features and _process_vision_input."""
    features = base.get_image_features(inputs["pixel_values"].repeat(2, 1, 1, 1))
    assert isinstance(features, ModelOutput)
    counts = processor._get_num_multimodal_tokens(image_sizes=([48, 64], [10_000, 10_000]))
    assert [len(tokens) for tokens in features.pooler_output] == counts["num_image_tokens"]
    assert {tokens.shape[1] for tokens in features.pooler_output} == {base.config.text_config.hidden_size}


def test_the_processor_counts_what_it_returns(folder, image, inputs):
    """multimodal.py, MultiModalProcessingInfo and _get_num_image_patches: rows of the pixels belong to the images."""
    processor = AutoProcessor.from_pretrained(folder)
    counts = processor._get_num_multimodal_tokens(image_sizes=([image.height, image.width],))
    assert sum(counts["num_image_patches"]) == len(inputs["pixel_values"])
    assert counts["num_image_tokens"] == [int((inputs["input_ids"] == processor.image_token_id).sum())]
    size = processor.image_processor.size
    assert size["height"] == size["width"] == 32
    # _get_modality_field_names: what no sub-processor declares does not reach the model.
    assert set(inputs) - {"input_ids", "attention_mask"} == set(processor.image_processor.model_input_names)


def test_the_processor_reports_where_each_image_went(processor, image):
    """multimodal.py, OffsetsMultiModalProcessor (transformers >= 5.15)."""
    text = [f"{processor.image_token} and {processor.image_token}"]
    output = processor(text=text, images=[image, image], return_text_replacement_offsets=True)
    entries = output["text_replacement_offsets"][0]
    assert [entry["type"] for entry in entries] == ["image", "image"]
    for entry in entries:
        ids = processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
        assert ids == [processor.image_token_id] * processor.num_image_tokens
    assert processor.tokenizer.encode(processor.image_token, add_special_tokens=False) == [processor.image_token_id]


def test_the_processor_marks_the_tokens_of_images(processor, image):
    """multimodal.py, LegacyMultiModalProcessor (transformers < 5.15)."""
    output = processor(text=["<image> red"], images=[image], return_tensors="pt", return_mm_token_type_ids=True)
    assert torch.equal(output["mm_token_type_ids"] == 1, output["input_ids"] == processor.image_token_id)


def test_the_plans_use_styles_that_vllm_knows(base):
    """base.py, recursive_replace; utils.py, Style: a linear layer outside the plan is replicated."""
    encoder = {rule: style for rule, style in base.tp_plan.items() if not rule.startswith("language_model.")}
    assert len(encoder) == 6
    assert set(encoder.values()) <= STYLES_OF_VLLM
    assert set(base.pp_plan) <= {f"language_model.{name}" for name in ("embed_tokens", "layers", "norm")}
