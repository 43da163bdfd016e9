"""Configurations refuse what they do not understand, and count tokens in one place."""

import pytest

from defocus_mllm import DefocusConfig, DefocusForImageClassification, DefocusVisionConfig
from defocus_mllm.console import USER_ERRORS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decayy": "none"}, r"unknown field 'decayy'; did you mean 'decay'"),
        ({"hidden_size": 100}, "hidden_size 100 must be a multiple of num_attention_heads 12"),
        ({"hidden_size": 36}, "must be even"),
        ({"image_size": 100}, "image_size 100 must be a multiple of patch_size 16"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in"),
        ({"class_token": False}, "aux_loss='pooled'"),
        ({"decay": "learned"}, "decay"),
        ({"hidden_size": "768"}, "hidden_size"),
        ({"patch_size": 0}, "patch_size must be positive"),
        ({"num_attention_heads": 0}, "num_attention_heads must be positive"),
        ({"num_registers": -1}, "num_registers must not be negative"),
        ({"hidden_act": "gulu"}, "hidden_act 'gulu' is unknown"),
        ({"decay": "data_dependent"}, "decay='data_dependent' is for mixer='mamba'"),
        ({"mixer": "retention", "causal": False}, "causal=False: mixer 'retention' is always causal"),
        ({"mixer": "mamba", "causal": False}, "causal=False: mixer 'mamba' is always causal"),
        ({"mixer": "mamba", "intermediate_size": 100}, "group_norm_size 64 must be 0 or divide intermediate_size 100"),
        ({"mixer": "mamba", "state_size": 15}, "state_size must be even, not 15"),
        ({"mixer": "mamba", "conv_kernel": 0}, "conv_kernel must be positive"),
        ({"mixer": "mamba", "context_broadcasting": "mean"}, "context_broadcasting follows a feed-forward layer"),
        ({"rope_scale_factor": 0}, "rope_scale_factor must be positive"),
        ({"patch_order": "sections"}, "needs section_size"),
        ({"section_size": 7}, "section_size is for patch_order='sections'"),
        ({"patch_order": "sections", "section_size": 4}, "section_size 4 must divide the 14 patches"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(USER_ERRORS, match=message):
        DefocusVisionConfig(**fields)


def test_an_unknown_field_of_the_multimodal_config_is_named():
    with pytest.raises(ValueError, match="unknown field 'projector_typ'; did you mean 'projector_type'"):
        DefocusConfig(projector_typ="linear")


@pytest.mark.parametrize("image_token_id", [-1, 50])
def test_the_placeholder_must_be_in_the_vocabulary(image_token_id):
    with pytest.raises(ValueError, match=f"image_token_id {image_token_id} lies outside the vocabulary of 50"):
        DefocusConfig(text_config={"model_type": "llama", "vocab_size": 50}, image_token_id=image_token_id)


def test_image_tokens_are_patches_registers_and_class_token():
    config = DefocusVisionConfig(image_size=64, patch_size=8, num_registers=3)
    assert config.num_patches == 64
    assert config.num_image_tokens == 64 + 3 + 1
    assert DefocusConfig(vision_config=config).num_image_tokens == 68
    assert DefocusVisionConfig(class_token=False, aux_loss="none").num_image_tokens == 196


def test_presets_accept_overrides_and_unknown_names_list_the_known():
    assert DefocusVisionConfig.from_preset("defocus_vit_small", causal=False).hidden_size == 384
    with pytest.raises(ValueError, match="defocus_vit_base"):
        DefocusVisionConfig.from_preset("defocus_vit_huge")


def test_base_has_the_published_number_of_parameters():
    config = DefocusVisionConfig.from_preset("defocus_vit_base", num_labels=1000)
    model = DefocusForImageClassification(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(87.4e6, rel=2e-3)


def test_a_saved_config_comes_back_equal(tmp_path):
    config = DefocusConfig(
        vision_config=DefocusVisionConfig.from_preset("defocus_vit_tiny", decay="fixed"),
        text_config={"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4, "tie_word_embeddings": True},
        projector_type="linear",
        image_token_id=7,
    )
    config.save_pretrained(tmp_path)
    loaded = DefocusConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.tie_word_embeddings
    assert DefocusVisionConfig.from_pretrained(tmp_path).decay == "fixed"


@pytest.mark.parametrize(
    ("mixer", "decay"), [("attention", "learnable"), ("retention", "learnable"), ("mamba", "data_dependent")]
)
def test_the_decay_left_open_is_the_mixers_own(mixer, decay):
    assert DefocusVisionConfig(mixer=mixer).decay == decay


@pytest.mark.parametrize(
    ("size", "new_size", "delta_scale", "rope_scale"), [(192, 384, 2.0, 4.0), (224, 1024, 4.57, 20.9)]
)
def test_another_resolution_follows_the_released_rule(size, new_size, delta_scale, rope_scale):
    config = DefocusVisionConfig.from_preset("defocus_mamba_base", image_size=size).for_image_size(new_size)
    assert (config.image_size, config.mixer) == (new_size, "mamba")
    assert config.delta_scale_factor == pytest.approx(delta_scale, rel=1e-3)
    assert config.rope_scale_factor == pytest.approx(rope_scale, rel=1e-3)
