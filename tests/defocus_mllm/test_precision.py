"""16 bits: what stays in float32, and how near everything else is to float32.

bfloat16 has 8 significant bits, so a number is off by up to 1/256 of itself. Norms keep the outputs of all models
within `NEAR`, as a share of their own norm; the filters' gradients, small sums of large numbers, are within
`NEAR_GRADIENT`. A phase rounded to bfloat16 would be off by a radian here: the sequences have 577 tokens.
"""

import copy
import itertools

import pytest
import torch

from defocus_mllm import (
    DefocusCLIPConfig,
    DefocusCLIPModel,
    DefocusConfig,
    DefocusForConditionalGeneration,
    DefocusForImageClassification,
    DefocusVisionConfig,
    DefocusVisionModel,
)
from defocus_mllm.fold_defocus import fold
from defocus_mllm.mixers_defocus import MIXERS

NEAR, NEAR_GRADIENT = 0.01, 0.3
SIDE = 192
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MAMBA = {"state_size": 4, "time_step_rank": 2, "group_norm_size": 16}
FILTER = ("lambda_hat", "theta", "A_log", "D", "decay_bias")
IMAGE = 3  # the image token's id

CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "device and dtype": lambda model: model.to(device="cpu", dtype=torch.bfloat16),
}


def vision_config(mixer, side=SIDE, **fields):
    return DefocusVisionConfig(image_size=side, patch_size=8, mixer=mixer, **{**WIDTHS, **MAMBA, **fields})


def build_multimodal(mixer, side=SIDE):
    text = {"model_type": "llama", "vocab_size": 30, **WIDTHS}
    config = DefocusConfig(vision_config=vision_config(mixer, side), text_config=text, image_token_id=IMAGE)
    return DefocusForConditionalGeneration(config)


def build_contrastive():
    text = {"model_type": "clip_text_model", "vocab_size": 30, "eos_token_id": 2, "bos_token_id": 1, **WIDTHS}
    config = DefocusCLIPConfig(vision_config=vision_config("retention", 16), text_config=text, projection_dim=8)
    return DefocusCLIPModel(config)


def distance(ours, reference):
    """Norm of the difference over the norm of the reference."""
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def named_tensors(model):
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def assert_filter_kept(model, before, narrow, names=FILTER):
    """Filters are what they were, bit for bit; everything else is narrow."""
    kept = [name for name in before if name.rsplit(".", 1)[-1] in names]
    assert kept
    for name, tensor in named_tensors(model).items():
        if name in kept:
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, before[name]), name
        elif tensor.is_floating_point() and "rotary_emb" not in name:  # Llama's own table is no parameter
            assert tensor.dtype == narrow, name


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_cast_leaves_the_filter_in_float32(mixer, cast):
    decay = {"decay": "learnable"} if mixer == "mamba" else {}  # with a decay_bias
    model = DefocusForImageClassification(vision_config(mixer, 16, num_labels=2, **decay))
    before = copy.deepcopy(named_tensors(model))
    assert_filter_kept(CASTS[cast](model), before, torch.float16 if cast == "half" else torch.bfloat16)
    assert {tensor.dtype for tensor in named_tensors(model.double()).values()} == {torch.float64}
    assert {tensor.device.type for tensor in named_tensors(model.to("meta", torch.bfloat16)).values()} == {"meta"}


def test_a_cast_leaves_fixed_filters_and_gradients_in_float32():
    fixed = DefocusVisionModel(vision_config("attention", 16, decay="fixed", rotary="fixed"))
    before = copy.deepcopy(named_tensors(fixed))
    assert_filter_kept(fixed.to(torch.bfloat16), before, torch.bfloat16)
    model = DefocusVisionModel(vision_config("attention", 16))
    model(torch.randn(1, 3, 16, 16)).pooler_output.sum().backward()
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name


@pytest.mark.parametrize("cast", ["to", "from_pretrained"])
def test_filters_inside_other_models_stay_in_float32_too(cast, tmp_path):
    for model, names in ((build_multimodal("mamba", 16), FILTER), (build_contrastive(), (*FILTER, "logit_scale"))):
        before = copy.deepcopy(named_tensors(model))
        if cast == "to":
            narrow = model.to(torch.bfloat16)
        else:
            model.save_pretrained(tmp_path / type(model).__name__)
            narrow = type(model).from_pretrained(tmp_path / type(model).__name__, dtype=torch.bfloat16)
        assert_filter_kept(narrow, before, torch.bfloat16, names)


@pytest.mark.parametrize("how", ["autocast", "cast"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_an_encoder_of_16_bits_is_near_the_one_of_32(mixer, how):
    model = DefocusForImageClassification(vision_config(mixer, num_labels=3)).train()
    narrow = copy.deepcopy(model).to(torch.bfloat16 if how == "cast" else torch.float32)
    inputs = {"pixel_values": torch.randn(2, 3, SIDE, SIDE), "labels": torch.tensor([0, 2])}
    expected = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        outputs = narrow(**inputs)
        hidden = narrow.encoder(inputs["pixel_values"]).last_hidden_state
    assert distance(hidden, model.encoder(inputs["pixel_values"]).last_hidden_state) < NEAR
    assert distance(outputs.loss, expected.loss) < NEAR
    assert outputs.loss.dtype == torch.float32
    expected.loss.backward()
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in narrow.named_parameters()}
    filters = [(name, p.grad) for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in FILTER]
    assert len(filters) >= 4
    for name, gradient in filters:
        assert gradients[name].dtype == torch.float32
        assert gradients[name].isfinite().all(), name
        assert distance(gradients[name], gradient) < NEAR_GRADIENT, name


@pytest.mark.parametrize("kind", MIXERS)
def test_phases_of_late_tokens_are_exact_under_autocast(kind):
    """A filter that forgets nothing and turns by 1.5 radians a token, to 900 of them, and nothing beside it."""
    mixer = MIXERS[kind](vision_config(kind))
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            value = {"theta": 1.5, "lambda_hat": -20, "A_log": -20, "D": 0}.get(name.rsplit(".", 1)[-1])
            if value is not None:
                parameter.fill_(value)
        tokens = torch.randn(2, 600, 32)
        expected = mixer(tokens)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(mixer(tokens)[0], expected) < 3 * NEAR


@pytest.mark.parametrize("how", ["autocast", "cast"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_language_model_of_16_bits_is_near_the_one_of_32(mixer, how):
    model = build_multimodal(mixer).eval()
    narrow = copy.deepcopy(model).to(torch.bfloat16 if how == "cast" else torch.float32)
    ids = torch.randint(5, 30, (1, model.config.num_image_tokens + 9))
    ids[:, 2 : 2 + model.config.num_image_tokens] = IMAGE
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, SIDE, SIDE)}
    inputs["labels"] = ids.masked_fill(ids == IMAGE, -100)
    expected = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        outputs = narrow(**inputs)
    assert distance(outputs.image_hidden_states, expected.image_hidden_states) < NEAR
    assert distance(outputs.logits, expected.logits) < NEAR
    assert distance(outputs.loss, expected.loss) < NEAR
    outputs.loss.backward()
    for name, parameter in narrow.named_parameters():
        if name.rsplit(".", 1)[-1] in FILTER:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("how", ["autocast", "cast"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_sums_carried_along_the_sequence_are_in_float32(mixer, how):
    broadcasting = {} if mixer == "mamba" else {"context_broadcasting": "mean"}
    model = DefocusVisionModel(vision_config(mixer, 48, **broadcasting)).eval()
    model = model.to(torch.bfloat16 if how == "cast" else torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        outputs = model(torch.randn(1, 3, 16, 48), use_cache=True, image_size=(48, 48))
    for layer in outputs.past_key_values.layers:
        if mixer != "attention":
            assert (layer.mixer.memory if mixer == "retention" else layer.mixer.scan).dtype == torch.float32
        if broadcasting:
            assert layer.token_sum.dtype == torch.float32


def test_attention_tables_are_in_float32_whatever_is_folded():
    """The folded numbers are the exact ones, rounded once."""
    query, key = (torch.randn(1, 2, 577, 8).bfloat16() for _ in range(2))
    decay, theta = torch.tensor([-0.05, -0.001]), torch.rand(2, 4)
    exact = fold(query.double(), key.double(), decay.double(), theta.double())
    for ours, reference in zip(fold(query, key, decay, theta), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        # of a pair of channels, since a turn mixes the two
        size = reference.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True)
        error = (ours.double() - reference).unflatten(-1, (-1, 2)).abs() / size
        assert error.max() < 1 / 256
