"""Batches: padded on the right, turns shuffled and cut by rule, everything dropped counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from training.conversations import Conversation
from training.encoding import IGNORED, SupervisionError, encoder_for
from training.sampling import SampleKey
from training.supervision import (
    ConversationCollator,
    describe_supervision,
    encode_conversation,
)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def conversation(num_pairs: int, picture: str | None, system: str | None = None) -> Conversation:
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for number in range(num_pairs):
        content = [{"type": "text", "text": f"question {number}?"}]
        if number == 0 and picture:
            content.insert(0, {"type": "image", "image": picture})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": f"answer {number}"}]})
    return Conversation(f"data.json[{num_pairs}]", messages)


def questions_and_answers(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    texts = [message["content"][-1]["text"] for message in messages if message["role"] != "system"]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_padding_is_on_the_right_masked_and_not_learnt(processor, picture):
    samples = [conversation(1, picture), conversation(3, None), conversation(2, picture)]
    batch = ConversationCollator(processor)(samples)
    lengths = [len(encode_conversation(processor, sample.messages)["labels"]) for sample in samples]
    assert batch["input_ids"].shape == (3, max(lengths))
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        example = encode_conversation(processor, sample.messages)
        for name, padding in (
            ("input_ids", processor.tokenizer.pad_token_id),
            ("attention_mask", 0),
            ("labels", IGNORED),
        ):
            assert torch.equal(batch[name][row, :length], example[name])
            assert (batch[name][row, length:] == padding).all()


def test_a_text_only_batch_has_no_pixels(processor):
    assert "pixel_values" not in ConversationCollator(processor)([conversation(2, None)])


def test_pictures_are_read_from_their_paths(processor, picture, tmp_path):
    batch = ConversationCollator(processor)([conversation(1, picture)])
    with Image.open(picture) as image:
        expected = processor.image_processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    (tmp_path / "broken.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"^data\.json\[1\]: .*broken\.png"):
        ConversationCollator(processor)([conversation(1, str(tmp_path / "broken.png"))])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 100), st.integers(0, 100), st.booleans())
def test_shuffling_permutes_pairs_and_keeps_the_image_in_front(processor, num_pairs, seed, epoch, index, system):
    sample = conversation(num_pairs, "picture.png", "Be brief." if system else None)
    collator = ConversationCollator(processor, shuffle_turns=True, seed=seed)
    messages = collator.choose_turns(sample, SampleKey(epoch, index))
    pairs = questions_and_answers(messages)
    assert sorted(pairs) == sorted(questions_and_answers(sample.messages))
    pictures = [
        number for number, message in enumerate(messages) for part in message["content"] if part["type"] == "image"
    ]
    assert pictures == [int(system)]
    assert messages[int(system)]["content"][0] == {"type": "image", "image": "picture.png"}
    assert messages == collator.choose_turns(sample, SampleKey(epoch, index))
    assert sample == conversation(num_pairs, "picture.png", "Be brief." if system else None)  # left as it was


def test_orders_differ_by_epoch_index_and_seed(processor):
    sample = conversation(8, "picture.png")

    def order(seed: int, epoch: int, index: int) -> list[tuple[str, str]]:
        collator = ConversationCollator(processor, shuffle_turns=True, seed=seed)
        return questions_and_answers(collator.choose_turns(sample, SampleKey(epoch, index)))

    orders = [order(0, 0, 0), order(0, 1, 0), order(0, 0, 1), order(1, 0, 0)]
    assert all(one != other for number, one in enumerate(orders) for other in orders[:number])


def test_every_pair_comes_first_about_equally_often(processor):
    collator = ConversationCollator(processor, shuffle_turns=True)
    sample = conversation(4, "picture.png")
    first = [questions_and_answers(collator.choose_turns(sample, SampleKey(epoch, 3)))[0] for epoch in range(400)]
    assert all(60 < first.count(pair) < 140 for pair in questions_and_answers(sample.messages))


def test_a_picture_in_a_later_question_keeps_the_order(processor):
    sample = conversation(6, "picture.png")
    sample.messages[4]["content"].append({"type": "image", "image": "other.png"})
    collator = ConversationCollator(processor, shuffle_turns=True)
    for epoch in range(3):
        assert collator.choose_turns(sample, SampleKey(epoch, 0)) == sample.messages
    assert collator.counts == {"kept_in_order": 3}


def test_max_turns_is_counted(processor, picture):
    collator = ConversationCollator(processor, max_turns=2)
    messages = collator.choose_turns(conversation(5, picture))
    assert questions_and_answers(messages) == [("question 0?", "answer 0"), ("question 1?", "answer 1")]
    assert collator.counts == {"over_max_turns": 3}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 200))
def test_whole_trailing_pairs_go_when_it_is_too_long(processor, num_pairs, max_length):
    sample = conversation(num_pairs, "picture.png", "Be brief.")
    count = encoder_for(processor).count_tokens
    fitting = [kept for kept in range(1, num_pairs + 1) if count(sample.messages[: 1 + 2 * kept]) <= max_length]
    collator = ConversationCollator(processor, max_length=max_length)
    if not fitting:
        needed = count(sample.messages[:3])
        with pytest.raises(SupervisionError, match=rf"data\.json\[{num_pairs}\].*raise max_length to {needed} "):
            collator.choose_turns(sample)
        return
    assert collator.choose_turns(sample) == sample.messages[: 1 + 2 * max(fitting)]
    assert collator.counts["over_max_length"] == num_pairs - max(fitting)


def test_wrong_use_is_named(processor):
    with pytest.raises(ValueError, match="max_turns"):
        ConversationCollator(processor, max_turns=0)
    with pytest.raises(ValueError, match="max_length"):
        ConversationCollator(processor, max_length=0)
    with pytest.raises(ValueError, match="keys"):
        ConversationCollator(processor, shuffle_turns=True)([conversation(2, None)])
    unfinished = Conversation("data.json[9]", conversation(2, None).messages[:3])
    with pytest.raises(SupervisionError, match=r"data\.json\[9\]"):
        ConversationCollator(processor)([unfinished])
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad token"):
        ConversationCollator(processor)


def test_the_description_shows_what_is_learnt(processor, picture):
    shown = describe_supervision(processor.tokenizer, encode_conversation(processor, conversation(2, picture).messages))
    tokens = processor.num_image_tokens
    assert shown.partition("\n")[2] == (
        f"<s><|user|><image> x {tokens}\nquestion 0?</s><|assistant|>[[answer 0</s>]]"
        "<|user|>question 1?</s><|assistant|>[[answer 1</s>]]"
    )
