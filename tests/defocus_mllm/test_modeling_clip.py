"""The contrastive model: its loss, its two encoders, padding, precision, saving, and the pipeline of Transformers."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPProcessor,
    pipeline,
)

from defocus_mllm import DefocusCLIPConfig, DefocusCLIPModel, DefocusImageProcessor, DefocusVisionConfig
from defocus_mllm.modeling_defocus_clip import contrastive_loss

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MAMBA = {"mixer": "mamba", "time_step_rank": 4, "group_norm_size": 16}
TEXTS = ["what color is the shape?", "a blue rectangle", "red"]


def make_model(text="clip_text_model", **vision):
    vision_config = DefocusVisionConfig(image_size=32, patch_size=8, **{**SIZES, "initializer_range": 0.2, **vision})
    text_config = {"model_type": text, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    text_config |= {"max_position_embeddings": 40, **SIZES}
    config = DefocusCLIPConfig(vision_config=vision_config, text_config=text_config, projection_dim=16)
    return DefocusCLIPModel(config).eval()


def encode(tokenizer, texts=TEXTS, side="right"):
    return tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")


def info_nce(images, texts, scale):
    """The loss by its definition, one probability after the other, in float64."""
    total = 0.0
    for rows, columns in ((images, texts), (texts, images)):
        for number, row in enumerate(rows.tolist()):
            weights = []
            for column in columns.tolist():
                product = sum(a * b for a, b in zip(row, column, strict=True))
                norms = math.sqrt(sum(a * a for a in row) * sum(b * b for b in column))
                weights.append(math.exp(scale * product / norms))
            total -= math.log(weights[number] / sum(weights))
    return total / (2 * len(images))


@pytest.mark.parametrize("vision", [{}, {"mixer": "retention"}, MAMBA], ids=["attention", "retention", "mamba"])
@pytest.mark.parametrize("text", ["clip_text_model", "llama"])
def test_loss_is_the_symmetric_cross_entropy_of_the_embeddings(tokenizer, text, vision):
    model = make_model(text, **vision).double()
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    inputs = encode(tokenizer)
    outputs = model(pixel_values=pixels, return_loss=True, **inputs)
    images = model.get_image_features(pixels).pooler_output
    texts = model.get_text_features(**inputs).pooler_output
    assert images.shape == texts.shape == (3, 16)
    assert outputs.logits_per_image.shape == (3, 3)
    assert torch.equal(outputs.logits_per_image.T, outputs.logits_per_text)
    assert outputs.image_embeds.norm(dim=-1).sub(1).abs().max() < 1e-12
    assert outputs.text_embeds.norm(dim=-1).sub(1).abs().max() < 1e-12
    expected = info_nce(images, texts, 1 / 0.07)
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-6)  # log(1 / 0.07) is kept in float32
    assert outputs.vision_model_output.last_hidden_state.shape == (3, 17, 32)
    assert outputs.text_model_output.last_hidden_state.shape == (*inputs["input_ids"].shape, 32)


def test_gradients_of_the_loss_agree_with_finite_differences():
    images, texts = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(contrastive_loss, (images, texts, scale), atol=1e-9)


def test_image_embedding_is_read_off_the_class_token():
    model = make_model()
    pixels = torch.randn(2, 3, 32, 32)
    features = model.get_image_features(pixels)
    assert torch.equal(features.pooler_output, model.visual_projection(features.last_hidden_state[:, -1]))


@pytest.mark.parametrize("text", ["clip_text_model", "llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_text_embedding(tokenizer, text, side):
    model = make_model(text).double()
    batch = encode(tokenizer, side=side)
    assert batch["attention_mask"].min() == 0
    batched = model.get_text_features(**batch).pooler_output
    alone = [model.get_text_features(encode(tokenizer, [line])["input_ids"]).pooler_output for line in TEXTS]
    assert (batched - torch.cat(alone)).abs().max() < 1e-9
    batch["input_ids"][batch["attention_mask"] == 0] = 7
    assert (model.get_text_features(**batch).pooler_output - batched).abs().max() < 1e-9


@pytest.mark.parametrize("text", ["clip_text_model", "llama"])
def test_every_word_reaches_the_text_embedding(tokenizer, text):
    model = make_model(text)
    inputs = encode(tokenizer, TEXTS[:1])
    before = model.get_text_features(**inputs).pooler_output
    for position in range(inputs["input_ids"].shape[1]):
        changed = inputs["input_ids"].clone()
        changed[0, position] += 1
        after = model.get_text_features(changed, inputs["attention_mask"]).pooler_output
        assert (after - before).abs().max() > 1e-4


def test_unusable_inputs_are_named(tokenizer):
    model = make_model()
    inputs = encode(tokenizer)
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="a text has no token"):
        model.get_text_features(**inputs)
    with pytest.raises(ValueError, match="one text an image, not 2 images and 3 texts"):
        model(pixel_values=torch.randn(2, 3, 32, 32), return_loss=True, **encode(tokenizer))


@pytest.mark.parametrize(("start", "bound"), [(9.0, 100.0), (-3.0, 1.0)])
def test_scale_stays_within_openclip_s_bounds_and_can_come_back(tokenizer, start, bound):
    model = make_model()
    torch.nn.init.constant_(model.logit_scale, start)
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), **encode(tokenizer)}
    outputs = model(**inputs)
    similarity = outputs.image_embeds @ outputs.text_embeds.T
    assert torch.allclose(outputs.logits_per_image, bound * similarity, rtol=1e-5)
    assert model.logit_scale == start  # inference changes no weight
    model.train()(**inputs, return_loss=True).loss.backward()
    assert model.logit_scale.item() == pytest.approx(math.log(bound))
    assert model.logit_scale.grad.abs() > 0


def test_loss_is_computed_in_float32_whatever_the_autocast(tokenizer):
    model = make_model()
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), "return_loss": True, **encode(tokenizer)}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
    assert outputs.vision_model_output.pooler_output.dtype == torch.bfloat16
    for name in ("loss", "logits_per_image", "image_embeds", "text_embeds"):
        assert outputs[name].dtype == torch.float32
    similarity = outputs.image_embeds @ outputs.text_embeds.T / 0.07
    assert torch.allclose(outputs.logits_per_image, similarity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["clip_text_model", "llama"])
def test_saved_and_loaded_it_is_the_same(tokenizer, image, tmp_path, text):
    model = make_model(text)
    image_processor = DefocusImageProcessor(size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text=TEXTS, images=[image], padding=True, return_tensors="pt")
    expected = model(**inputs).logits_per_image
    for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
        loaded = auto_class.from_pretrained(tmp_path)
        assert isinstance(loaded, DefocusCLIPModel)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        # equal weights at other addresses in memory may be multiplied in another order
        assert torch.allclose(loaded(**inputs).logits_per_image, expected, rtol=1e-5, atol=1e-5)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.logit_scale.dtype == torch.float32
    assert half.visual_projection.weight.dtype == torch.bfloat16
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path))
    answers = classify(image, candidate_labels=TEXTS, hypothesis_template="{}")
    scores = {answer["label"]: answer["score"] for answer in answers}
    assert [scores[text] for text in TEXTS] == pytest.approx(expected.softmax(dim=-1)[0].tolist(), rel=1e-4)


def test_tuples_and_hidden_states_come_out_as_in_transformers(tokenizer):
    model = make_model()
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), "return_loss": True, **encode(tokenizer)}
    outputs = model(**inputs, output_hidden_states=True)
    assert len(outputs.vision_model_output.hidden_states) == len(outputs.text_model_output.hidden_states) == 3
    assert torch.equal(model(**inputs, return_dict=False)[0], outputs.loss)


def test_parameters_of_b32():
    """The paper reports 161.9 M for De-focus Mamba-B/32 and 151.3 M for OpenCLIP's ViT-B/32."""
    counts = {}
    with torch.device("meta"):
        for preset in ("defocus_mamba_base", "defocus_vit_base"):
            config = DefocusCLIPConfig(vision_config=DefocusVisionConfig.from_preset(preset, patch_size=32))
            counts[preset] = sum(parameter.numel() for parameter in DefocusCLIPModel(config).parameters())
    # 92,882,304 vision, 63,165,952 text, 393,216 and 262,144 in the projections, 1 scale
    assert counts == {"defocus_mamba_base": 156_703_617, "defocus_vit_base": 151_281_297}


def test_configuration_survives_a_round_trip_and_refuses_typos(tmp_path):
    config = DefocusCLIPConfig(vision_config={"hidden_size": 96}, text_config={"model_type": "llama"})
    assert config.text_config.use_cache is False
    config.save_pretrained(tmp_path)
    assert DefocusCLIPConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert DefocusCLIPConfig().text_config.model_type == "clip_text_model"
    with pytest.raises(ValueError, match="'projection_dims'; did you mean 'projection_dim'"):
        DefocusCLIPConfig(projection_dims=3)
    with pytest.raises(StrictDataclassError, match="projection_dim must be positive, not 0"):
        DefocusCLIPConfig(projection_dim=0)
