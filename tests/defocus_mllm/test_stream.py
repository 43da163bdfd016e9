"""A stream reads what arrives and answers as the batch path does; forks and questions leave it as it is."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusVisionConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MIXERS = ("attention", "retention", "mamba")
IMAGE_TOKEN, BEFORE, QUESTION, OTHER = 4, [1, 7, 9], [11, 12, 13, 3], [14, 8, 3]
IMAGE_TOKENS = 16 + 1 + 1
NEW = {"max_new_tokens": 6, "do_sample": False}


def build(mixer="attention", text=None, **fields):
    torch.manual_seed(0)
    mamba = {"state_size": 4, "time_step_rank": 3, "group_norm_size": 16}
    vision = {"mixer": mixer, "image_size": 32, "patch_size": 8, "num_registers": 1, **SIZES, **mamba, **fields}
    text = {"model_type": "llama", "initializer_range": 0.4, **SIZES, **(text or {})}
    ids = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 63, "pad_token_id": 0}
    config = DefocusConfig(vision_config=DefocusVisionConfig(**vision), text_config={**text, **ids})
    return DefocusForConditionalGeneration(config).eval()


def batch(model, ids, pixels, **kwargs):
    """The batch path: the whole prompt at once; the answer and the logits of its tokens."""
    kwargs = {**NEW, "return_dict_in_generate": True, "output_logits": True, **kwargs}
    output = model.generate(input_ids=torch.tensor([ids]), pixel_values=pixels, **kwargs)
    return output.sequences[0, len(ids) :], torch.cat(output.logits)


def assert_answers(stream, question, expected, **kwargs):
    output = stream.ask(question, **NEW, return_dict_in_generate=True, output_logits=True, **kwargs)
    answer, logits = expected
    assert output.sequences[0].tolist() == answer.tolist()
    torch.testing.assert_close(torch.cat(output.logits), logits, rtol=1e-4, atol=1e-4)


def image(ids):
    return [*ids, *[IMAGE_TOKEN] * IMAGE_TOKENS]


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32)


MODELS = {mixer: build(mixer) for mixer in MIXERS}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixer=st.sampled_from(MIXERS), splits=st.sets(st.integers(1, 3)), whole=st.booleans())
def test_any_split_answers_as_the_batch_path(pixels, mixer, splits, whole):
    model = MODELS[mixer]
    ids = image([*image(BEFORE), 5])
    stream = model.open_stream()
    stream.push_text(BEFORE)
    for rows in pixels[0].tensor_split([8 * split for split in sorted(splits)], dim=1):
        stream.push(rows)
    stream.push_text(torch.tensor([[5]]))
    for rows in pixels[1:2].split(32 if whole else 8, dim=2):
        stream.push(rows)
    assert stream.input_ids.tolist() == [ids]
    assert_answers(stream, QUESTION, batch(model, ids + QUESTION, pixels[:2]))


@pytest.mark.parametrize("mixer", MIXERS)
def test_frames_answer_as_a_sequence_of_frames(pixels, mixer):
    model = MODELS[mixer]
    stream = model.open_stream(frames=True)
    stream.push_text(BEFORE)
    for frame in pixels:
        stream.push(frame[:, :8])
        stream.push(frame[:, 8:])
    ids = image(image(image(BEFORE)))
    expected = batch(model, ids + QUESTION, pixels[None])
    assert_answers(stream, QUESTION, expected)
    assert stream.vision_cache.num_images == 3
    apart = batch(model, ids + QUESTION, pixels)
    assert (apart[1][0] - expected[1][0]).abs().max() > 1e-2, "the batch path knows frames from images"
    features = model.get_image_features(pixels[None]).pooler_output
    assert [tuple(frame.shape) for frame in features] == [(IMAGE_TOKENS, 32)] * 3


def test_frames_in_beams_are_repeated_together(pixels):
    model = MODELS["retention"]
    ids = image(image(BEFORE)) + QUESTION
    answer, _ = batch(model, ids, pixels[None, :2], num_beams=3)
    stream = model.open_stream(frames=True)
    stream.push_text(BEFORE)
    stream.push(pixels[0])
    stream.push(pixels[1])
    assert stream.ask(QUESTION, num_beams=3, **NEW)[0].tolist() == answer.tolist()
    several = stream.ask(QUESTION, num_beams=3, num_return_sequences=2, **NEW)
    assert several.shape[0] == 2
    torch.manual_seed(1)
    sampled = stream.ask(QUESTION, do_sample=True, num_return_sequences=4, max_new_tokens=3)
    torch.manual_seed(1)
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels[None, :2]}
    expected = model.generate(**inputs, do_sample=True, num_return_sequences=4, max_new_tokens=3)
    assert sampled.tolist() == expected[:, len(ids) :].tolist()


@pytest.mark.parametrize("mixer", MIXERS)
def test_questions_leave_the_stream_as_it_is_and_read_nothing_twice(pixels, mixer, monkeypatch):
    model = MODELS[mixer]
    read, encoded = [], []
    hooks = [
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        ),
        model.model.vision_tower.register_forward_hook(lambda module, args, output: encoded.append(output[0].shape[1])),
    ]
    stream = model.open_stream()
    stream.push_text(BEFORE)
    for rows in pixels[0].split(8, dim=1):
        stream.push(rows)
    assert read == [3, 4, 4, 4, 6]
    first = stream.ask(QUESTION, **NEW)
    assert read[5] == len(QUESTION)
    assert all(length == 1 for length in read[6:])
    other = stream.ask(OTHER, **NEW)
    assert other.tolist() != first.tolist()
    assert stream.ask(QUESTION, **NEW).tolist() == first.tolist()
    assert encoded == [4, 4, 4, 6]
    assert stream.num_tokens == 3 + IMAGE_TOKENS
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("mixer", MIXERS)
def test_forks_go_their_own_ways(pixels, mixer):
    model = MODELS[mixer]
    stream = model.open_stream()
    stream.push_text(BEFORE)
    stream.push(pixels[0, :, :16])
    fork = stream.fork()
    keys, forked = (one._decoder_cache.layers[0].keys for one in (stream, fork))
    assert forked is keys, "nothing is copied"
    stream.push(pixels[0, :, 16:])
    fork.push(pixels[1, :, 16:])
    fork.push_text([5])
    mixed = torch.cat([pixels[0, :, :16], pixels[1, :, 16:]], dim=1)
    assert_answers(stream, QUESTION, batch(model, image(BEFORE) + QUESTION, pixels[:1]))
    assert_answers(fork, QUESTION, batch(model, [*image(BEFORE), 5, *QUESTION], mixed[None]))


DECODERS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_key_value_heads": 2},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
        "head_dim": 8,
    },
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_other_decoders_with_other_caches(pixels, decoder):
    text = {"model_type": decoder, "num_key_value_heads": 4, **DECODERS[decoder]}
    if decoder == "gpt2":
        text = {key: value for key, value in text.items() if key != "num_key_value_heads"}
    model = build(text=text)
    stream = model.open_stream()
    stream.push_text(BEFORE)
    for rows in pixels[0].split(8, dim=1):
        stream.push(rows)
    expected = batch(model, image(BEFORE) + QUESTION, pixels[:1])
    assert_answers(stream, QUESTION, expected)
    fork = stream.fork()
    fork.push(pixels[1])
    stream.ask(OTHER, **NEW)
    assert_answers(stream, QUESTION, expected)
    assert_answers(fork, QUESTION, batch(model, image(image(BEFORE)) + QUESTION, pixels[:2]))


def test_a_decoder_that_forgets_between_pieces_is_refused(monkeypatch, pixels):
    text = {"model_type": "lfm2", "num_key_value_heads": 4, **DECODERS["lfm2"]}
    model = build(text=text)
    monkeypatch.setattr(
        "transformers.cache_utils.LinearAttentionLayer.update_conv_state", lambda self, states, *_, **__: states
    )
    with pytest.raises(ValueError, match="language model 'lfm2': with a cache it does not read"):
        model.open_stream()


def test_bamba_is_right_or_refused(pixels):
    text = {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    model = build(text={"model_type": "bamba", "num_key_value_heads": 4, **text})
    try:
        stream = model.open_stream()
    except ValueError:
        return  # Transformers 5.23 and 5.24
    stream.push_text(BEFORE)
    stream.push(pixels[0])
    assert_answers(stream, QUESTION, batch(model, image(BEFORE) + QUESTION, pixels[:1]))


def test_an_answer_before_the_image_is_complete_must_be_asked_for(pixels, caplog):
    model = MODELS["attention"]
    stream = model.open_stream()
    stream.push_text(BEFORE)
    stream.push(pixels[0, :, :8])
    assert stream.missing_rows == 3
    with pytest.raises(ValueError, match="the image lacks 3 rows; push them, or ask with partial=True"):
        stream.ask(QUESTION, **NEW)
    with pytest.raises(ValueError, match="the image lacks 3 rows; text can follow"):
        stream.push_text([5])
    features = model.get_image_features(pixels[:1]).pooler_output[0][:4]
    ids = torch.tensor([[*BEFORE, *[IMAGE_TOKEN] * 4, *QUESTION]])
    expected = model.generate(input_ids=ids, mm_encoder_outputs={"image": {"pooler_output": [features]}}, **NEW)
    assert stream.ask(QUESTION, partial=True, **NEW).tolist() == expected[:, ids.shape[1] :].tolist()
    assert "answering although the image lacks 3 rows" in caplog.text
    caplog.clear()
    stream.push(pixels[0, :, 8:])
    stream.ask(QUESTION, partial=True, **NEW)
    assert "answering although" not in caplog.text
    assert_answers(stream, QUESTION, batch(model, image(BEFORE) + QUESTION, pixels[:1]))


def refuse(match, method, *args, **kwargs):
    stream = method.__self__
    before = stream.num_tokens, stream.missing_rows, stream.vision_cache.num_tokens
    with pytest.raises(ValueError, match=match):
        method(*args, **kwargs)
    assert before == (stream.num_tokens, stream.missing_rows, stream.vision_cache.num_tokens)


def test_mistakes_are_refused_and_change_nothing(pixels):
    model = MODELS["mamba"]
    stream = model.open_stream()
    stream.push_text(BEFORE)
    stream.push(pixels[0, :, :24])
    refuse("2 rows of patches, but the image lacks only 1 of its 4", stream.push, pixels[0, :, :16])
    refuse(r"\(channels, rows, width\), with or without a 1, not \(2, 3, 8, 32\)", stream.push, pixels[:2, :, :8])
    refuse("height 4 and width 32 must be multiples of 8", stream.push, pixels[0, :, :4])
    stream.push(pixels[0, :, 24:])
    refuse("the question is empty", stream.ask, [])
    refuse("without a processor the stream takes token ids", stream.ask, "what is it?")
    refuse("without a processor the stream takes token ids", stream.push_text, "and")
    refuse("the text has image placeholders; push pixels", stream.ask, [5, IMAGE_TOKEN])
    refuse("integers of shape", stream.push_text, torch.ones(2, 3, dtype=torch.long))
    refuse("integers of shape", stream.push_text, torch.ones(3))
    refuse("ask: past_key_values is the stream's own", stream.ask, QUESTION, past_key_values=None)
    assert_answers(stream, QUESTION, batch(model, image(BEFORE) + QUESTION, pixels[:1]))
    with pytest.raises(ValueError, match="a non-causal encoder needs whole images; use generate"):
        build(causal=False).open_stream()


def test_an_error_inside_the_language_model_changes_nothing(pixels, monkeypatch):
    model = build()
    stream = model.open_stream()
    stream.push_text(BEFORE)
    stream.push(pixels[0, :, :16])
    with monkeypatch.context() as patch:
        patch.setattr(model.model.language_model.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
        for method, argument in ((stream.push, pixels[0, :, 16:]), (stream.ask, QUESTION)):
            with pytest.raises(ZeroDivisionError):
                method(argument, **({"partial": True, **NEW} if method == stream.ask else {}))
    stream.push(pixels[0, :, 16:])
    with monkeypatch.context() as patch:
        patch.setattr(model.model.language_model.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.push_text([5])
    assert_answers(stream, QUESTION, batch(model, image(BEFORE) + QUESTION, pixels[:1]))


def test_the_context_of_the_language_model_is_the_limit(pixels):
    model = build(text={"max_position_embeddings": 24})
    stream = model.open_stream()
    stream.push_text(BEFORE)
    stream.push(pixels[0, :, :24])
    stream.push(pixels[0, :, 24:])
    refuse("would have 25 tokens, more than the model's context of 24", stream.ask, [5] * 4, **NEW)
    refuse("would have 25 tokens", stream.push_text, [5] * 4)
    refuse("would have 25 tokens", stream.push, pixels[0, :, :8])


def test_the_window_of_attention_reaches_the_mixer(pixels, monkeypatch):
    windows = []
    model = build()
    mixer = type(model.model.vision_tower.layers[0].mixer)
    monkeypatch.setattr(mixer, "start_state", lambda self, window: windows.append(window))
    stream = model.open_stream(attention_window=9)
    stream.push(pixels[0])
    stream.push(pixels[1])
    assert windows == [9] * 4, "two blocks, two images"
    windows.clear()
    stream = model.open_stream(frames=True, attention_window=9)
    stream.push(pixels[0])
    stream.push(pixels[1])
    assert windows == [9] * 2, "two blocks, one sequence"


def user(*parts):
    return [
        {
            "role": "user",
            "content": [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts],
        }
    ]


def rendered(model, processor, *parts):
    """Inputs of the batch path, as the command line and the evaluation render them."""
    inputs = processor.apply_chat_template(
        user(*parts), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, **NEW, return_dict_in_generate=True, output_logits=True)
    ids = inputs["input_ids"]
    return ids, inputs["pixel_values"], (output.sequences[0, ids.shape[1] :], torch.cat(output.logits))


BARE_TEMPLATE = (
    "{% for part in messages[0]['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %} answer:"
)


@pytest.mark.parametrize("template", [None, BARE_TEMPLATE])
@pytest.mark.parametrize("frames", [False, True])
def test_plain_text_is_the_rendered_prompt(model, processor, image, template, frames):
    processor.chat_template = template or processor.chat_template
    other, question = Image.new("RGB", (40, 40), "blue"), "is there a red circle in the image?"
    parts = ["is it", {"type": "image", "image": image}, "what", "color", {"type": "image", "image": other}, "and now:"]
    ids, pixels, expected = rendered(model, processor, *parts, question)
    if frames:
        expected = batch(model, ids[0].tolist(), pixels[None])
    stream = model.open_stream(processor, frames=frames)
    texts = [part for part in parts if isinstance(part, str)]
    stream.push_text(texts[0])
    for rows in pixels[0].split(8, dim=1):
        stream.push(rows)
    stream.push_text(texts[1])
    stream.push_text(texts[2])
    stream.push(pixels[1])
    stream.push_text(texts[3])
    assert_answers(stream, question, expected)
    assert_answers(stream, question, expected)
    read = stream.num_tokens
    assert stream.input_ids[0].tolist() == ids[0, :read].tolist()


def test_an_image_and_a_question_are_rendered_as_in_the_chat(model, processor, image):
    ids, pixels, expected = rendered(model, processor, {"type": "image", "image": image}, "what color is the shape?")
    stream = model.open_stream(processor)
    stream.push(pixels[0, :, :8])
    stream.ask("is it?", partial=True, **NEW)
    stream.push(pixels[0, :, 8:])
    assert_answers(stream, "what color is the shape?", expected)
    begins = ids[0].tolist().index(processor.image_token_id)
    assert stream.num_tokens == begins + processor.num_image_tokens, "nothing of the question has been read"


def test_plain_text_is_checked(model, processor):
    stream = model.open_stream(processor)
    stream.push(torch.zeros(3, 32, 32))
    refuse("with a processor the stream takes plain text, not list", stream.ask, [5])
    refuse("with a processor the stream takes plain text, not Tensor", stream.push_text, torch.tensor([5]))
    question = stream._question_ids("what is <image>?")
    assert processor.image_token_id not in question
    assert "what is <image>?" in processor.tokenizer.decode(question)
    processor.chat_template = "{{ messages[0]['content'] | length }}<image>"
    stream = model.open_stream(processor)
    stream.push(torch.zeros(3, 32, 32))
    refuse("changes what has been read", stream.ask, "what?")


def test_a_model_that_lies_on_disk_streams_the_same(pixels, tmp_path):
    model = MODELS["retention"]
    model.save_pretrained(tmp_path / "checkpoint")
    offloaded = DefocusForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint", device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    ).eval()
    assert offloaded.get_input_embeddings().weight.is_meta
    stream = offloaded.open_stream()
    stream.push_text(BEFORE)
    for rows in pixels[0].split(8, dim=1):
        stream.push(rows)
    assert_answers(stream, QUESTION, batch(model, image(BEFORE) + QUESTION, pixels[:1]))
