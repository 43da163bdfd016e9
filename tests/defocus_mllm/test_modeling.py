"""The multimodal LLM: one causal sequence, caches, padding, any decoder, saving and loading."""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusModel

DECODERS = ["llama", "qwen3", "mistral", "gpt_neox", "olmo2"]


def user(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def encode(processor, conversations):
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )


def answer(model, processor, conversations, **options):
    inputs = encode(processor, conversations)
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    return generated[:, inputs["input_ids"].shape[1] :]


def test_words_and_pixels_are_one_causal_sequence(model, processor, image):
    inputs = encode(processor, [[user("what color is the shape?", image)]])
    changed = inputs["input_ids"].clone()
    changed[0, -4] = processor.tokenizer.convert_tokens_to_ids("?")
    position = changed.shape[1] - 4
    before, after = model(**inputs).logits, model(**{**inputs, "input_ids": changed}).logits
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position:], after[:, position:])


def test_a_later_patch_changes_no_earlier_logit(model, processor, image):
    inputs = encode(processor, [[user("what color is the shape?", image)]])
    pixels = inputs["pixel_values"].clone()
    pixels[:, :, 8:16, 8:16] += 1  # patch 5 of 16
    first = (inputs["input_ids"][0] == processor.image_token_id).nonzero()[0].item()
    before, after = model(**inputs).logits, model(**{**inputs, "pixel_values": pixels}).logits
    assert torch.equal(before[:, : first + 5], after[:, : first + 5])
    assert (before[:, first + 5 :] != after[:, first + 5 :]).any(dim=-1).all()


@pytest.mark.parametrize("mixer", ["attention", "retention", "mamba"])
def test_every_mixer_feeds_the_language_model(mixer, model, processor, image, tmp_path):
    config = model.config.to_dict()
    config["vision_config"] |= {"mixer": mixer, "decay": None, "group_norm_size": 16, "time_step_rank": 4}
    mixed = DefocusForConditionalGeneration(DefocusConfig.from_dict(config)).eval()
    conversation = [[user("what color is the shape?", image)]]
    expected = answer(mixed, processor, conversation, use_cache=False)
    assert torch.equal(answer(mixed, processor, conversation), expected)
    mixed.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert again.config.vision_config.mixer == mixer
    inputs = encode(processor, conversation)
    assert torch.equal(again(**inputs).logits, mixed(**inputs).logits)


def test_image_tokens_stand_where_the_placeholders_are(model, processor, image):
    inputs = encode(processor, [[user("is it?", image)]])
    captured = {}
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
    )
    features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
    output = model(**inputs)
    placeholders = inputs["input_ids"] == processor.image_token_id
    assert placeholders.sum() == processor.num_image_tokens == model.config.num_image_tokens
    assert torch.equal(captured["inputs_embeds"][placeholders], features)
    words = model.get_input_embeddings()(inputs["input_ids"][~placeholders])
    assert torch.equal(captured["inputs_embeds"][~placeholders], words)
    assert torch.equal(output.image_hidden_states, features)


@pytest.mark.parametrize("count", [0, 1, 18])
def test_placeholders_must_match_the_image_tokens(model, processor, count):
    input_ids = torch.full((1, count + 1), processor.image_token_id)
    input_ids[:, -1] = 5
    with pytest.raises(ValueError, match=f"{count} image placeholders but the images give 36 tokens"):
        model(input_ids=input_ids, pixel_values=torch.zeros(2, 3, 32, 32))


def test_a_placeholder_without_an_image_is_refused(model, processor):
    input_ids = torch.full((1, 3), processor.image_token_id)
    with pytest.raises(ValueError, match="no image was given"):
        model(input_ids=input_ids)


def test_the_cache_is_returned_and_continues_the_sequence(model, processor, image):
    model = model.double()
    inputs = encode(processor, [[user("what color is the shape?", image)]])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"].double()
    whole = model(input_ids=ids, pixel_values=pixels, use_cache=True)
    assert whole.past_key_values.get_seq_length() == ids.shape[1]
    begun = model(input_ids=ids[:, :-2], pixel_values=pixels, use_cache=True)
    rest = model(input_ids=ids[:, -2:], past_key_values=begun.past_key_values)
    torch.testing.assert_close(rest.logits, whole.logits[:, -2:], rtol=1e-9, atol=1e-9)


def test_cached_and_uncached_generation_agree(model, processor, image):
    conversations = [[user("what color is the shape?", image)]]
    cached = answer(model, processor, conversations)
    assert torch.equal(cached, answer(model, processor, conversations, use_cache=False))
    assert torch.equal(cached, answer(model, processor, conversations, cache_implementation="static"))


def test_left_padded_batch_equals_single(model, processor, image):
    other = Image.new("RGB", (40, 40), "blue")
    conversations = [
        [user("is it?", image)],
        [user("what color is the shape? is there a red circle in the image?", other)],
        [user("compare: is it red?", image, other)],
        [user("no image here")],
    ]
    batch = encode(processor, conversations)
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert (batch["attention_mask"][0, 0] == 0).item()
    together = model(**batch).logits
    for index, conversation in enumerate(conversations):
        inputs = encode(processor, [conversation])
        alone = model(**inputs).logits[0]
        torch.testing.assert_close(together[index, -len(alone) :], alone, rtol=1e-4, atol=1e-4)
        generated = answer(model, processor, conversations)[index]
        expected = answer(model, processor, [conversation])[0]
        ends = (expected == processor.tokenizer.eos_token_id).nonzero()
        length = ends[0].item() + 1 if len(ends) else len(expected)
        assert torch.equal(generated[:length], expected[:length])


def test_precomputed_image_features_give_the_same_logits(model, processor, image):
    inputs = encode(processor, [[user("is it red?", image)]])
    features = model.get_image_features(inputs["pixel_values"])
    text = {key: value for key, value in inputs.items() if key != "pixel_values"}
    assert torch.equal(model(**text, mm_encoder_outputs={"image": features}).logits, model(**inputs).logits)


def test_the_loss_counts_supervised_tokens_and_can_be_divided_by_another_number(model, processor, image):
    inputs = encode(processor, [[user("is it red?", image)]])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    output = model(**inputs, labels=labels)
    logits = output.logits[0, -4:-1].log_softmax(-1)
    expected = -logits.gather(1, labels[0, -3:, None]).mean()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=6).loss, expected / 2)


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("tied", [False, True])
def test_any_decoder_is_used_as_it_is(model_type, tied, vision_config, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {"model_type": model_type, "vocab_size": 50, "tie_word_embeddings": tied, **sizes}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if model_type != "gpt_neox":
        text["num_key_value_heads"] = 2
    config = DefocusConfig(vision_config=vision_config, text_config=text, image_token_id=4)
    model = DefocusForConditionalGeneration(config).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    plain = AutoModelForCausalLM.from_config(config.text_config).eval()
    plain.get_decoder().load_state_dict(model.model.language_model.state_dict())
    plain.get_output_embeddings().weight.data.copy_(model.lm_head.weight)
    input_ids = torch.randint(5, 50, (2, 9))
    torch.testing.assert_close(model(input_ids=input_ids).logits, plain(input_ids=input_ids).logits)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=input_ids).logits, model(input_ids=input_ids).logits)


def test_save_and_load_by_auto_classes_gives_identical_logits(model, processor, image, tmp_path):
    inputs = encode(processor, [[user("what color is the shape?", image)]])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reloaded = (
        AutoModelForImageTextToText.from_pretrained(tmp_path).eval(),
        AutoProcessor.from_pretrained(tmp_path),
    )
    again = encode(reloaded, [[user("what color is the shape?", image)]])
    assert {key: value.tolist() for key, value in again.items()} == {
        key: value.tolist() for key, value in inputs.items()
    }
    assert torch.equal(loaded(**again).logits, model(**inputs).logits)
    assert isinstance(AutoModel.from_pretrained(tmp_path), DefocusModel)


def test_both_projectors_are_built(vision_config):
    text = {
        "model_type": "llama",
        "vocab_size": 20,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    for projector_type, layers in (("linear", 1), ("mlp2x_gelu", 2)):
        config = DefocusConfig(vision_config=vision_config, text_config=text, projector_type=projector_type)
        projector = DefocusModel(config).multi_modal_projector
        assert sum(isinstance(module, torch.nn.Linear) for module in projector.modules()) == layers
        assert projector(torch.randn(2, 5, 32)).shape == (2, 5, 16)
