"""One template renders training and inference; placeholders are expanded and counted; images become pixels."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing

from defocus_mllm import DefocusImageProcessor, DefocusProcessor

ENCODE = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


def conversation(image):
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what color is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "is it blue?"},
        {"role": "assistant", "content": "no"},
    ]


def test_the_rendered_conversation(processor, image):
    assert processor.apply_chat_template(conversation(image)) == (
        "<s><|user|><image>\nwhat color is it?</s><|assistant|>red</s><|user|>is it blue?</s><|assistant|>no</s>"
    )


def test_the_prompt_of_inference_is_a_prefix_of_what_training_saw(processor, image):
    whole = processor.apply_chat_template(conversation(image), **ENCODE)["input_ids"][0].tolist()
    for turns in (1, 3):
        prompt = processor.apply_chat_template(conversation(image)[:turns], add_generation_prompt=True, **ENCODE)
        ids = prompt["input_ids"][0].tolist()
        assert whole[: len(ids)] == ids


def test_an_image_after_the_text_stays_after_the_text(processor, image):
    content = [{"type": "text", "text": "look:"}, {"type": "image", "image": image}]
    rendered = processor.apply_chat_template([{"role": "user", "content": content}])
    assert rendered == "<s><|user|>look:\n<image></s>"


def test_a_placeholder_becomes_as_many_tokens_as_an_image_has(processor, image):
    encoded = processor.apply_chat_template(conversation(image), **ENCODE)
    assert (encoded["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens
    assert encoded["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("template", [None, "{% for part in messages[0].content %}<image> it{% endfor %}"])
def test_prompt_ids_are_those_of_the_batch_path_with_one_placeholder_an_image(processor, image, template):
    processor.chat_template = template or processor.chat_template
    tokenizer = processor.tokenizer
    # A tokenizer that adds its beginning token, as Llama's does: a template that writes it must not get two.
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
    messages = [{"role": "user", "content": [{"type": "image", "image": image}] * 2}]
    batch = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids, placeholder = processor.prompt_ids(messages), processor.image_token_id
    assert ids.count(placeholder) == 2
    assert ids.count(bos[1]) == 1
    count = processor.num_image_tokens
    repeated = [token for token in ids for _ in range(count if token == placeholder else 1)]
    assert repeated == batch["input_ids"][0]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    answers=st.lists(st.sampled_from(["red", "a blue rectangle", "no", "été 日本", "x" * 30]), min_size=1, max_size=4)
)
def test_the_assistant_mask_covers_answers_and_ends_of_turn_alone(processor, image, answers):
    messages = []
    for index, text in enumerate(answers):
        picture = [{"type": "image", "image": image}] if index == 0 else []
        messages += [
            {"role": "user", "content": [*picture, {"type": "text", "text": f"question {index}?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
    encoded = processor.apply_chat_template(messages, return_assistant_tokens_mask=True, **ENCODE)
    supervised = encoded["input_ids"][encoded["assistant_masks"].bool()]
    assert processor.tokenizer.decode(supervised) == "".join(f"{text}</s>" for text in answers)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}], "roles are system, user and assistant, not tool"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "image or text, not audio"),
    ],
)
def test_what_the_template_cannot_render_is_an_error(processor, messages, message):
    with pytest.raises(Exception, match=message):
        processor.apply_chat_template(messages)


@pytest.mark.parametrize(("text", "count"), [("<image> <image> it?", 1), ("it?", 1)])
def test_the_number_of_placeholders_must_be_the_number_of_images(processor, image, text, count):
    with pytest.raises(ValueError, match="image"):
        processor(images=[image] * count, text=text, return_tensors="pt")


def test_another_image_token_is_rendered_too(tokenizer, image):
    tokenizer.add_special_tokens({"image_token": "<picture>"}, replace_extra_special_tokens=False)
    processor = DefocusProcessor(DefocusImageProcessor(), tokenizer, image_token="<picture>")
    assert processor.apply_chat_template(conversation(image)).startswith("<s><|user|><picture>\nwhat")


def test_a_tokenizer_without_the_image_token_is_refused(tokenizer):
    tokenizer.image_token = None
    with pytest.raises(ValueError, match="no token '<picture>'"):
        DefocusProcessor(DefocusImageProcessor(), tokenizer, image_token="<picture>")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_of_pillow_becomes_three_normalised_channels(mode):
    processor = DefocusImageProcessor(size={"height": 16, "width": 16})
    pixels = processor(Image.new("RGB", (9, 30), "white").convert(mode), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    torch.testing.assert_close(pixels, torch.ones_like(pixels))  # white is 1 under mean 0.5 and std 0.5


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    pixels = DefocusImageProcessor(size={"height": 8, "width": 8})(deep, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.full((1, 3, 8, 8), 128 / 127.5 - 1), atol=1e-2, rtol=0)


def test_pixels_equal_pillows_bicubic_resize():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    pixels = DefocusImageProcessor(size={"height": 16, "width": 16})(image, return_tensors="np")["pixel_values"][0]
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels, expected / 127.5 - 1, atol=1e-5)


def frames_of(kind):
    pictures = [Image.new("RGB", (16, 16), (40 * number, 0, 0)) for number in range(5)]
    if kind == "pictures":
        return pictures
    array = np.stack([np.asarray(picture) for picture in pictures])
    return array if kind == "array" else torch.from_numpy(array)


@pytest.mark.parametrize("kind", ["pictures", "array", "tensor"])
@pytest.mark.parametrize(
    ("num_frames", "taken"), [(None, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (2, [0, 2]), (1, [0])]
)
def test_a_video_is_its_frames_at_even_distances(processor, kind, num_frames, taken):
    def messages(*parts):
        return [{"role": "user", "content": [{"type": "text", "text": "is it"}, *parts]}]

    video = messages({"type": "video", "video": frames_of(kind)}, {"type": "text", "text": "red?"})
    pictures = [{"type": "image", "image": frames_of("pictures")[place]} for place in taken]
    expected = processor.apply_chat_template(messages(*pictures, {"type": "text", "text": "red?"}), **ENCODE)
    by_name = processor.apply_chat_template(video, num_frames=num_frames, **ENCODE)
    in_a_batch = processor.apply_chat_template([video], processor_kwargs={"num_frames": num_frames}, **ENCODE)
    for encoded in (by_name, in_a_batch):
        assert torch.equal(encoded["input_ids"], expected["input_ids"])
        assert torch.equal(encoded["pixel_values"], expected["pixel_values"])
    assert video[0]["content"][1]["type"] == "video"


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        ("film.mp4", {}, "video: give its frames, as images or an array, not str; decode files first"),
        (None, {}, "not NoneType"),
        ([], {}, "num_frames: 0 frames cannot be taken from a video of 0"),
        (np.zeros((16, 16, 3)), {}, "video: an array of frames has 4 dimensions, not 3"),
        (frames_of("array"), {"num_frames": 6}, "num_frames: 6 frames cannot be taken from a video of 5"),
        (frames_of("array"), {"processor_kwargs": {"fps": 2}}, "fps: a video is a list of frames here"),
        (frames_of("array"), {"fps": 2}, "fps: a video is a list of frames here"),
    ],
)
def test_what_is_no_video_is_an_error(processor, video, options, message):
    messages = [{"role": "user", "content": [{"type": "video", "video": video}]}]
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages, **ENCODE, **options)


@pytest.mark.parametrize("modality", ["videos", "audio"])
def test_nothing_that_is_given_is_left_out_in_silence(processor, modality):
    with pytest.raises(ValueError, match=f"^{modality}: "):
        processor(text="it?", return_tensors="pt", **{modality: [np.zeros((2, 16, 16, 3))]})
