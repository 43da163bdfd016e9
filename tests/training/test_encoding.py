"""Labels by construction: exactly the answers and the end of turn behind each, whatever the texts say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from defocus_mllm import DefocusProcessor, chat_defocus
from training.encoding import IGNORED, ConversationEncoder, SupervisionError, encoder_for

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<image>", "<|user|>", "<|assistant|>", "<|system|>"]
TRAPS = [*SPECIAL, " ASSISTANT: ", "USER:", "<|assistant", "{{ 1 }}", "{% generation %}", "\ue000text\ue001", "\n", " "]
# U+2581 is sentencepiece's own sign for the space; lone surrogates are no text.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12)
PLAIN = PLAIN.filter(lambda text: text.strip())
ADVERSARIAL = st.lists(st.one_of(PLAIN, st.sampled_from(TRAPS)), min_size=1, max_size=4).map("".join)
ADVERSARIAL = ADVERSARIAL.filter(lambda text: text.strip())
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
    """Also by Transformers alone, which tokenizes the whole text and reads the marks of the template."""
    reference = ProcessorMixin.apply_chat_template(
        processor, messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
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
    example = encoder.encode(messages)
    assert_equals_rendering(processor, messages, example)
    assert encoder.count_tokens(messages) == len(example["input_ids"])


@PER_TEST_FIXTURES
@given(ADVERSARIAL, ADVERSARIAL)
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


def test_a_template_whose_messages_depend_on_their_place(processor):
    other = DefocusProcessor(processor.image_processor, processor.tokenizer, 5, chat_template=NUMBERED_TEMPLATE)
    trap = [PAIR[0], {"role": "assistant", "content": [{"type": "text", "text": "a</s>b"}]}]
    example = ConversationEncoder(other).encode(PAIR + trap)
    assert (
        other.tokenizer.decode(example["input_ids"]).replace("<image>", "")
        == "<s>1: what? 2: red</s> 3: what? 4: a</s>b</s> "
    )
    # This template does not honour add_generation_prompt: the model has to write the number too.
    assert other.tokenizer.decode(example["input_ids"][example["labels"] != IGNORED]) == "2: red</s>4: a</s>b</s>"
    assert (example["input_ids"] == other.tokenizer.eos_token_id).sum() == 2
    assert len(example["pixel_values"]) == 2


def test_a_template_that_trims_texts(processor):
    template = processor.chat_template.replace("part['text']", "part['text'].strip()")
    encoder = ConversationEncoder(DefocusProcessor(processor.image_processor, processor.tokenizer, 5, template))
    spaced = [PAIR[0], {"role": "assistant", "content": [{"type": "text", "text": " red </s>\n"}]}]
    plain = [PAIR[0], {"role": "assistant", "content": "red </s>"}]
    for name in ("input_ids", "labels"):
        assert torch.equal(encoder.encode(spaced)[name], encoder.encode(plain)[name])


def test_a_template_without_generation_marks(processor):
    template = processor.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    other = DefocusProcessor(processor.image_processor, processor.tokenizer, 5, chat_template=template)
    marked, unmarked = (ConversationEncoder(one).encode(PAIR * 2) for one in (processor, other))
    unmarked_ids = unmarked["input_ids"][unmarked["input_ids"] != processor.image_token_id]
    assert torch.equal(unmarked_ids, marked["input_ids"][marked["input_ids"] != processor.image_token_id])
    assert torch.equal(unmarked["labels"][unmarked["labels"] >= 0], marked["labels"][marked["labels"] >= 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # what stands in the history differs from what was generated
        (
            ("{{- eos_token -}}{%- endgen", "{{- eos_token if loop.last else ';' -}}{%- endgen"),
            "otherwise than its prompt",
        ),
        (
            ("parts(message['content']) -}}{{- eos_token -}}{%- endgen", "'...' -}}{%- endgen"),
            "does not write the answer",
        ),
        # the first thing behind the prompt is a mark that inference never generates
        (
            ("{%- if add_generation_prompt -%}", "{%- if false -%}"),
            "must write answers whole and honour add_generation",
        ),
        (("'<image>'", "'a picture'"), "writes 0 images, but there are 2"),
        (("['system', 'user']", "['system']"), "roles are system, user"),
    ],
)
def test_templates_that_cannot_be_learnt_from_are_refused(processor, change, message):
    old, new = change
    template = processor.chat_template.replace("('system', 'user')", "['system', 'user']")
    assert old in template
    other = DefocusProcessor(
        processor.image_processor, processor.tokenizer, 5, chat_template=template.replace(old, new)
    )
    with pytest.raises(SupervisionError, match=rf"^data\.json\[3\]: .*{message}"):
        ConversationEncoder(other).encode(PAIR * 2, "data.json[3]")


@pytest.mark.parametrize("answer", ["", " \n", [{"type": "text", "text": " "}], []])
def test_an_empty_answer_is_refused(processor, answer):
    with pytest.raises(SupervisionError, match=r"^data\.json\[3\]: an answer is empty"):
        encoder_for(processor).encode([*PAIR, PAIR[0], {"role": "assistant", "content": answer}], "data.json[3]")


def test_nothing_to_learn_is_refused(processor):
    with pytest.raises(SupervisionError, match=r"data\.json\[3\] has no token to learn"):
        encoder_for(processor).encode(PAIR[:1], "data.json[3]")


def test_remembered_texts_do_not_change_the_result(processor, monkeypatch):
    encoder = ConversationEncoder(processor)
    first = encoder.encode(PAIR * 2)
    again = encoder.encode(PAIR * 2)
    monkeypatch.setattr(chat_defocus, "_MOST_CACHED_TEXTS", 1)
    processor._chat_encoders.clear()
    small = processor.chat_encoder(None)
    forgetful = encoder.encode(PAIR * 2)
    assert len(small._texts) == 1
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, forgetful[name])


def test_there_is_one_encoder_for_each_processor_and_template(processor):
    encoder = encoder_for(processor)
    assert encoder_for(processor) is encoder
    processor.chat_template = NUMBERED_TEMPLATE
    assert encoder_for(processor) is not encoder
