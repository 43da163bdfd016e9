"""Labels by construction: exactly the answers and the end of turn behind each, whatever the texts say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from defocus_mllm import DefocusProcessor
from training import encoding
from training.encoding import IGNORED, ConversationEncoder, SupervisionError, encoder_for

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<image>", "<|user|>", "<|assistant|>", "<|system|>"]
TRAPS = [*SPECIAL, " ASSISTANT: ", "USER:", "<|assistant", "{{ 1 }}", "{% generation %}", "\ue000text\ue001", "\n", " "]
# U+2581 is sentencepiece's own sign for the space; lone surrogates are no text.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1, max_size=12)
ADVERSARIAL = st.lists(st.one_of(PLAIN, st.sampled_from(TRAPS)), min_size=1, max_size=4).map("".join)
HARMLESS = PLAIN.filter(lambda text: not any(token in text for token in SPECIAL))
PER_TEST_FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def conversations(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Messages: perhaps a system text, one to four pairs, an image before, behind or between texts or none."""

    def build(system, pairs, layout):
        messages = []
        for index, (question, answer) in enumerate(pairs):
            content = [{"type": "text", "text": question}]
            if index == 0:
                picture = {"type": "image", "image": Image.new("RGB", (8, 8), "red")}
                content = {"none": content, "front": [picture, *content], "back": [*content, picture]}.get(
                    layout, [*content, picture, {"type": "text", "text": answer}]
                )
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        start = [{"role": "system", "content": system}] if system else []
        return start + messages

    pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)
    layouts = st.sampled_from(["none", "front", "back", "between"])
    return st.builds(build, st.one_of(st.none(), texts), pairs, layouts)


def answers(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]


def num_images(messages: list[dict[str, Any]]) -> int:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return sum(part["type"] == "image" for part in parts)


def assert_equals_rendering(processor: Any, messages: list[dict[str, Any]], example: dict[str, torch.Tensor]) -> None:
    reference = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert torch.equal(example["input_ids"], reference["input_ids"][0])
    assert torch.equal(example["attention_mask"], reference["attention_mask"][0])
    assert torch.equal(example["labels"] != IGNORED, torch.as_tensor(reference["assistant_masks"])[0].bool())
    if "pixel_values" in reference:
        assert torch.equal(example["pixel_values"], reference["pixel_values"])


@PER_TEST_FIXTURES
@given(conversations(ADVERSARIAL))
def test_supervised_tokens_are_the_answers_and_their_ends(processor, messages):
    tokenizer = processor.tokenizer
    example = encoder_for(processor).encode(messages)
    ids, labels = example["input_ids"], example["labels"]
    supervised = ids[labels != IGNORED]
    assert torch.equal(supervised, labels[labels != IGNORED])
    ends = (supervised == tokenizer.eos_token_id).nonzero().flatten().tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    assert supervised[-1] == tokenizer.eos_token_id
    learnt = [tokenizer.decode(supervised[start:end]) for start, end in zip(starts, ends, strict=True)]
    assert learnt == answers(messages)
    assert tokenizer.decode(supervised) == "".join(answer + "</s>" for answer in answers(messages))
    # nor can a text make an image, a turn or an end of turn
    assert (ids == processor.image_token_id).sum() == num_images(messages) * processor.num_image_tokens
    assert (ids == tokenizer.eos_token_id).sum() == len(messages)
    assert (ids == tokenizer.bos_token_id).sum() == 1
    assert len(example.get("pixel_values", [])) == num_images(messages)


@PER_TEST_FIXTURES
@given(conversations(HARMLESS))
def test_tokens_and_labels_equal_the_processors_own_rendering(processor, messages):
    encoder = encoder_for(processor)
    assert encoder.by_segments
    example = encoder.encode(messages)
    assert_equals_rendering(processor, messages, example)
    assert encoder.count_tokens(messages) == len(example["input_ids"])


@PER_TEST_FIXTURES
@given(HARMLESS, HARMLESS)
def test_training_starts_with_the_prompt_of_inference(processor, question, answer):
    user = {"role": "user", "content": [{"type": "text", "text": question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    example = encoder_for(processor).encode([user, assistant])
    prompt = processor.apply_chat_template(
        [user], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )["input_ids"][0]
    assert torch.equal(example["input_ids"][: len(prompt)], prompt)
    assert (example["labels"] != IGNORED).nonzero()[0] == len(prompt)


PAIR: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [{"type": "image", "image": Image.new("RGB", (8, 8))}, {"type": "text", "text": "what?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]
NUMBERED_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ loop.index }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ image_token }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}"
)


def test_a_template_whose_messages_depend_on_their_place_is_rendered_whole(processor):
    other = DefocusProcessor(processor.image_processor, processor.tokenizer, 5, chat_template=NUMBERED_TEMPLATE)
    encoder = ConversationEncoder(other)
    assert not encoder.by_segments
    example = encoder.encode(PAIR * 2)
    assert (
        other.tokenizer.decode(example["input_ids"]).replace("<image>", "")
        == "<s>1: what? 2: red</s> 3: what? 4: red</s> "
    )
    assert other.tokenizer.decode(example["input_ids"][example["labels"] != IGNORED]) == "red</s>red</s>"
    assert len(example["pixel_values"]) == 2
    trap = [PAIR[0], {"role": "assistant", "content": [{"type": "text", "text": "a</s>b"}]}]
    with pytest.raises(SupervisionError, match=r"data\.json\[3\].*'</s>'"):
        encoder.encode(trap, "data.json[3]")


def test_a_template_that_trims_texts_is_rendered_whole(processor):
    template = processor.chat_template.replace("part['text']", "part['text'].strip()")
    encoder = ConversationEncoder(DefocusProcessor(processor.image_processor, processor.tokenizer, 5, template))
    assert not encoder.by_segments
    spaced = [PAIR[0], {"role": "assistant", "content": " red "}]
    assert torch.equal(encoder.encode(spaced)["input_ids"], encoder.encode(PAIR)["input_ids"])


def byte_level(merges_spaces_with_words: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of the GPT-2, Llama 3 and Qwen kind, or of the Llama 2 kind that puts a space before a text."""
    model = Tokenizer(models.BPE(byte_fallback=not merges_spaces_with_words))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if merges_spaces_with_words:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
    else:
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        model.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    texts = ["What is this? A bus, 3 m high. And the colour?\n\nOne word. Red question answer"] * 3
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "u": "<|user|>", "a": "<|assistant|>", "s": "<|system|>"},
    )


@pytest.mark.parametrize("kind", [True, False], ids=["byte level", "space before the text"])
def test_other_kinds_of_tokenizers(processor, kind):
    other = DefocusProcessor(processor.image_processor, byte_level(kind), 5)
    encoder = ConversationEncoder(other)
    assert encoder.by_segments == kind
    second: list[dict[str, Any]] = [
        {"role": "user", "content": "\n\nAnd the colour?"},
        {"role": "assistant", "content": "Red\n"},
    ]
    example = encoder.encode(PAIR + second)
    assert_equals_rendering(other, PAIR + second, example)
    learnt = example["input_ids"][example["labels"] != IGNORED]
    assert other.tokenizer.decode(learnt) == "red</s>Red\n</s>"


def test_a_template_without_generation_marks_is_refused(processor):
    template = processor.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    other = DefocusProcessor(processor.image_processor, processor.tokenizer, 5, chat_template=template)
    with pytest.raises(SupervisionError, match=r"data\.json\[3\] has no token to learn"):
        ConversationEncoder(other).encode(PAIR, "data.json[3]")


def test_nothing_to_learn_is_refused(processor):
    with pytest.raises(SupervisionError, match=r"data\.json\[3\] has no token to learn"):
        encoder_for(processor).encode(PAIR[:1], "data.json[3]")


def test_remembered_messages_do_not_change_the_result(processor, monkeypatch):
    encoder = ConversationEncoder(processor)
    first = encoder.encode(PAIR * 2)
    again = encoder.encode(PAIR * 2)
    monkeypatch.setattr(encoding, "_MOST_CACHED_MESSAGES", 1)
    small = ConversationEncoder(processor)
    forgetful = small.encode(PAIR * 2)
    assert len(small._messages) == 1
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, forgetful[name])


def test_there_is_one_encoder_for_each_processor_and_template(processor):
    encoder = encoder_for(processor)
    assert encoder_for(processor) is encoder
    processor.chat_template = NUMBERED_TEMPLATE
    assert encoder_for(processor) is not encoder
