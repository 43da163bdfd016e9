"""What Transformers expects of a model class; upstream's own tests of it run with `make upstream-tests`."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.modeling_utils import local_torch_dtype

from defocus_mllm import (
    DefocusConfig,
    DefocusForConditionalGeneration,
    DefocusForImageClassification,
    DefocusModel,
    DefocusVisionConfig,
    DefocusVisionModel,
)
from defocus_mllm.cache_defocus import CACHE_NAME

MIXERS = ["attention", "retention", "mamba"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGES = {"image_size": 16, "patch_size": 8}
ALWAYS_FLOAT32 = {
    "attention": {"band_pass.lambda_hat", "band_pass.theta"},
    "retention": {"band_pass.lambda_hat", "band_pass.theta"},
    "mamba": {"A_log", "D", "theta"},
}


def vision_config_of(mixer="attention", **fields):
    return DefocusVisionConfig(mixer=mixer, **SIZES, **IMAGES, **fields)


def inputs_of(model, batch=1):
    ids = torch.full((batch, model.config.num_image_tokens + 3), 7)
    ids[:, 1:-2] = model.config.image_token_id
    size = model.config.vision_config.image_size
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, size, size)}


@pytest.mark.parametrize("causal", [True, False])
def test_the_weights_of_attention_are_those_that_it_mixes_with(causal):
    encoder = DefocusVisionModel(vision_config_of(causal=causal)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    shown, plain = encoder(pixels, output_attentions=True), encoder(pixels)
    assert plain.attentions is None
    assert [tuple(weights.shape) for weights in shown.attentions] == [(2, 4, 5, 5)] * 2
    torch.testing.assert_close(shown.last_hidden_state, plain.last_hidden_state, rtol=1e-4, atol=1e-5)
    for weights in shown.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
        assert bool((weights.triu(1) == 0).all()) == causal


@pytest.mark.parametrize("mixer", ["retention", "mamba"])
def test_other_mixers_have_no_weights_to_show(mixer):
    outputs = DefocusVisionModel(vision_config_of(mixer))(torch.randn(1, 3, 16, 16), output_attentions=True)
    assert outputs.attentions == ()


def test_a_multimodal_output_holds_what_the_encoder_returned(model):
    model.set_attn_implementation("eager")  # Llama's sdpa shows no weights
    outputs = model(**inputs_of(model, batch=2), output_attentions=True, output_hidden_states=True)
    assert len(outputs.image_outputs.pooler_output) == 2
    assert len(outputs.image_outputs.attentions) == len(outputs.attentions) == 2
    assert len(outputs.image_outputs.hidden_states) == 3
    assert torch.equal(torch.cat(list(outputs.image_outputs.pooler_output)), outputs.image_hidden_states)


def test_regression_is_the_mean_squared_error():
    classifier = DefocusForImageClassification(
        vision_config_of(num_labels=1, problem_type="regression", aux_loss="none")
    ).eval()
    pixels, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.5, -2.0])
    outputs = classifier(pixels, labels=labels)
    torch.testing.assert_close(outputs.loss, ((outputs.logits[:, 0] - labels) ** 2).mean())


def test_an_unknown_field_of_a_file_is_kept_and_named(tmp_path, caplog):
    config = DefocusConfig(vision_config=vision_config_of(), text_config={"model_type": "llama", **SIZES})
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["written_by"] = saved["vision_config"]["rotari"] = "another tool"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with caplog.at_level("WARNING"):
        loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.written_by, loaded.vision_config.rotari) == ("another tool", "another tool")
    assert "DefocusConfig: unknown field 'written_by'" in caplog.text
    assert "DefocusVisionConfig: unknown field 'rotari'; did you mean 'rotary'?" in caplog.text
    with pytest.raises(ValueError, match="unknown field 'rotari'"):
        vision_config_of(rotari="none")


@pytest.mark.parametrize("mixer", MIXERS)
def test_rates_and_phases_are_float32_in_a_model_built_in_16_bits(mixer):
    with local_torch_dtype(torch.bfloat16, "DefocusVisionModel"):
        encoder = DefocusVisionModel(vision_config_of(mixer))
    kept = {name.split("mixer.")[1] for name, tensor in encoder.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == ALWAYS_FLOAT32[mixer]


@pytest.mark.parametrize("mixer", MIXERS)
def test_initialisation_on_the_meta_device_gives_the_values_of_the_constructor(mixer, tmp_path):
    encoder = DefocusVisionModel(vision_config_of(mixer, num_registers=1))
    fixed = {name: tensor for name, tensor in encoder.state_dict().items() if "mixer" in name and "proj" not in name}
    encoder.save_pretrained(tmp_path, state_dict={"norm.weight": encoder.norm.weight})
    loaded = DefocusVisionModel.from_pretrained(tmp_path).state_dict()
    for name in ALWAYS_FLOAT32[mixer]:
        assert torch.equal(loaded[f"layers.1.mixer.{name}"], fixed[f"layers.1.mixer.{name}"])
    assert all(tensor.isfinite().all() and not tensor.is_meta for tensor in loaded.values())
    assert 0.01 < loaded["embeddings.cls_token"].std() < 0.03


def test_a_sharded_checkpoint_loads_with_parts_on_disk(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="60KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 2
    size = sum(parameter.nbytes for parameter in model.parameters())
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "checkpoint",
        device_map="auto",
        max_memory={"cpu": int(0.6 * size)},
        offload_folder=tmp_path / "offload",
    ).eval()
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    inputs = inputs_of(model)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_weight_of_the_encoder_can_lie_on_disk(mixer, tmp_path):
    encoder = DefocusVisionModel(vision_config_of(mixer, num_registers=1, context_broadcasting="none")).eval()
    encoder.save_pretrained(tmp_path / "checkpoint")
    loaded = DefocusVisionModel.from_pretrained(
        tmp_path / "checkpoint",
        device_map={"embeddings": "disk", "layers": "disk", "norm": "cpu"},
        offload_folder=tmp_path / "offload",
    ).eval()
    assert all(parameter.is_meta for parameter in loaded.layers.parameters())
    pixels = torch.randn(1, 3, 16, 16)
    expected = encoder(pixels).last_hidden_state
    assert torch.equal(loaded(pixels).last_hidden_state, expected)
    first = loaded(pixels[:, :, :8], use_cache=True)
    second = loaded(pixels[:, :, 8:], cache=first[CACHE_NAME])
    pieces = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
    torch.testing.assert_close(pieces, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_splits_head_and_embedding_together(tied, vision_config):
    text_config = {"model_type": "llama", "vocab_size": 50, "tie_word_embeddings": tied, **SIZES}
    plan = DefocusForConditionalGeneration(DefocusConfig(vision_config=vision_config, text_config=text_config)).tp_plan
    assert ("lm_head" in plan) == ("model.language_model.embed_tokens" in plan)
    assert "model.language_model.layers.*.mlp.down_proj" in plan


@pytest.mark.parametrize("asked", ["sdpa", "eager", {"text_config": "eager", "vision_config": "sdpa"}])
def test_every_attention_back_end_of_the_language_model_gives_the_same(asked, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=asked).eval()
    expected = asked if isinstance(asked, str) else asked["text_config"]
    assert loaded.model.language_model.config._attn_implementation == expected
    inputs = inputs_of(model)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_back_end_for_the_language_model_does_not_stop_the_encoder(model):
    config = model.config
    config.vision_config._attn_implementation = "flash_attention_2"
    assert DefocusModel(config).vision_tower.config._attn_implementation == "sdpa"


def test_a_model_without_output_layer_says_who_generates(model, tmp_path):
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert not hasattr(base, "generate")
    with pytest.raises(AttributeError, match="load it with AutoModelForImageTextToText"):
        base.generate()
