"""Conversations to ids: what tokenizers do beside words, and the processor's ways to ask for a batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from defocus_mllm import DefocusImageProcessor, DefocusProcessor
from defocus_mllm.chat_defocus import ChatEncoder, ChatError
from defocus_mllm.chat_templates import choose_template

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from chat_tokenizers import PAIRS, build_processor, build_tokenizer

PICTURE = {"type": "image", "image": Image.new("RGB", (4, 4), "red")}
ASKED = {"role": "user", "content": [PICTURE, {"type": "text", "text": "What is it?"}]}
BUS = {"role": "assistant", "content": "A bus."}
TRAP = {"role": "user", "content": [{"type": "text", "text": "Is <image> a </s> word?"}, PICTURE]}
BATCH: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
LEFT = {"padding": True, "padding_side": "left"}


def with_template(tokenizer: Any, template: str) -> DefocusProcessor:
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return DefocusProcessor(DefocusImageProcessor(size={"height": 8, "width": 8}), tokenizer, 2, template)


def simple(begin: str, end: str) -> str:
    """A template with these marks around each message."""
    return (
        "{%- for message in messages -%}"
        f"{{{{- '{begin}' -}}}}"
        "{%- for part in message['content'] if message['content'] is not string -%}"
        "{{- '<image>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}"
        "{{- message['content'] if message['content'] is string else '' -}}"
        f"{{{{- '{end}' -}}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- '{begin}' -}}}}{{%- endif -%}}"
    )


def test_a_slow_tokenizer() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    processor = with_template(tokenizer, choose_template("vicuna_v1", tokenizer).text)
    messages = [TRAP, {"role": "assistant", "content": "A <image> and </s>, <extra_id_1>."}]
    chat = processor.encode_chat(messages)
    assert chat.ids.count(tokenizer.eos_token_id) == 1
    assert chat.ids.count(processor.image_token_id) == 1
    said = [token for token, answered in zip(chat.ids, chat.answered, strict=True) if answered]
    assert said == [*(byte + 3 for byte in b" A <image> and </s>, <extra_id_1>."), tokenizer.eos_token_id]


def test_marks_that_take_in_the_space_beside_them() -> None:
    tokenizer = build_tokenizer("llama_3")
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken("<|end|>", rstrip=True), AddedToken("<|say|>", lstrip=True, rstrip=True)]},
        replace_extra_special_tokens=False,
    )
    processor = with_template(tokenizer, simple("\\n<|say|>\\n ", " <|end|>\\n"))
    messages = [ASKED, BUS, {"role": "user", "content": "Colour?"}]
    chat = processor.encode_chat(messages, add_generation_prompt=True)
    assert chat.ids == tokenizer(chat.text)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(chat.ids)
    assert "".join(tokens).endswith("<|end|><|say|>Colour?Ġ<|end|><|say|>")


def test_a_word_that_the_template_uses_as_a_mark_is_one() -> None:
    tokenizer = build_tokenizer("qwen")
    processor = with_template(tokenizer, simple("<think>", "<|im_end|>"))
    said = {"role": "assistant", "content": "A<think>B</think>"}
    chat = processor.encode_chat([ASKED, said])
    tokens = tokenizer.convert_ids_to_tokens(chat.ids)
    assert tokens.count("<think>") == 2  # once a message
    assert tokens.count("</think>") == 1  # an ordinary word of this tokenizer
    assert tokenizer.decode(chat.ids).endswith("A<think>B</think><|im_end|>")


def test_what_a_normaliser_turns_into_a_mark_is_an_error() -> None:
    tokenizer = build_tokenizer("gpt_2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<END>", normalized=True)])
    processor = with_template(tokenizer, simple("<END>", "<|endoftext|>"))
    processor.encode_chat([ASKED, BUS])
    with pytest.raises(ChatError, match=r"reads '<END>' in the plain text 'Is ＜END＞'"):
        processor.encode_chat([{"role": "user", "content": "Is ＜END＞"}, BUS])


def test_texts_that_make_a_mark_together() -> None:
    processor = with_template(build_tokenizer("llama_3"), simple("<|start_header_id|>", "<|eot_id|>"))
    halves = [{"type": "text", "text": "x <|eot"}, {"type": "text", "text": "_id|> y"}]
    chat = processor.encode_chat([{"role": "user", "content": halves}, BUS])
    assert chat.text == "<|start_header_id|>x <|eot_id|> y<|eot_id|><|start_header_id|>A bus.<|eot_id|>"
    assert chat.ids.count(processor.tokenizer.eos_token_id) == 2


COUNTED = "{%- endfor -%}{%- if add_generation_prompt -%}{{- messages | length -}}"


@pytest.mark.parametrize(("kind", "template"), [pair for pair in PAIRS if pair[1] != "plain"])
@pytest.mark.parametrize("asked_again", [False, True])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be </s>"}]])
def test_remembered_forms_take_less_time_and_give_the_same(
    kind: str, template: str, asked_again: bool, system: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = build_processor(kind, template)
    system = [] if kind.startswith("llama_2") and template == "tokenizer" else system  # it takes none
    pairs = [[TRAP if index % 3 else ASKED, {"role": "assistant", "content": f"{index}. A </s>"}] for index in range(9)]
    messages = [*system, *(message for pair in pairs for message in pair), *([TRAP] if asked_again else [])]
    counted = []
    render = ProcessorMixin.apply_chat_template

    def count(self: Any, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(conversation))
        return render(self, conversation, *args, **kwargs)

    monkeypatch.setattr(ProcessorMixin, "apply_chat_template", count)
    chat = processor.encode_chat(messages, add_generation_prompt=asked_again)
    assert sum(counted) < 6 * len(messages) + 60
    counted.clear()
    assert processor.encode_chat(messages, add_generation_prompt=asked_again) == chat
    assert counted == [len(messages)]  # with other texts in the same places too
    counted.clear()
    monkeypatch.setattr(ChatEncoder, "_remembered_turns", lambda *_: None)
    assert processor.encode_chat(messages, add_generation_prompt=asked_again) == chat
    assert sum(counted) > len(messages) ** 2 / 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{{- '<|im_start|>' ~ message['role']", "{{- '<|im_start|>' ~ loop.index ~ message['role']"),  # by place
        ("{%- endfor -%}\n{%- if add_generation_prompt -%}", COUNTED),  # by the number of messages
        ("if add_generation_prompt -", "if add_generation_prompt and messages | length < 4 -"),  # in short ones alone
    ],
)
def test_forms_are_not_remembered_where_the_place_matters(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = build_processor("qwen", "chatml")
    assert old in processor.chat_template
    processor.chat_template = processor.chat_template.replace(old, new)
    messages = [ASKED, BUS] * 6

    def outcome() -> Any:
        try:
            return processor.encode_chat(messages)
        except ChatError as error:
            return str(error)

    quick = outcome()
    monkeypatch.setattr(ChatEncoder, "_remembered_turns", lambda *_: None)
    assert outcome() == quick


def test_space_that_a_template_trims_is_not_taken_for_remembered() -> None:
    processor = build_processor("llama_3", "tokenizer")  # it trims
    for words in ("A bus.", " A bus.\n", "\n\n", "A bus."):
        messages = [ASKED, BUS | {"content": words}] * 3
        fresh = build_processor("llama_3", "tokenizer")
        assert processor.encode_chat(messages) == fresh.encode_chat(messages)
        assert fresh.tokenizer.decode(fresh.encode_chat(messages).ids).count(f"{words.strip()}<|eot_id|>") >= 3


def test_an_answer_without_an_end_token_ends_with_its_turn() -> None:
    tokenizer = build_tokenizer("qwen")
    processor = with_template(tokenizer, simple("<|im_start|>", "\\n"))
    for pairs in (2, 5):
        chat = processor.encode_chat([ASKED, BUS] * pairs)
        assert chat.ends == [None] * pairs
        said = [token for token, answered in zip(chat.ids, chat.answered, strict=True) if answered]
        assert tokenizer.decode(said) == "A bus.\n" * pairs


def test_a_character_that_the_tokenizer_does_not_know() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "bus": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    processor = with_template(tokenizer, simple("", "</s>"))
    chat = processor.encode_chat([{"role": "user", "content": "bus"}, {"role": "assistant", "content": "日 bus"}])
    assert chat.ids == [2, 1, 0, 2, 1]
    assert chat.answered == [False, False, True, True, True]


def test_no_token_reaches_across_the_beginning_of_an_answer() -> None:
    processor = build_processor("llama_3", "chatml")
    messages = [ASKED, {"role": "assistant", "content": "\nRed"}, {"role": "user", "content": "Colour?"}]
    chat = processor.encode_chat(messages, add_generation_prompt=True)
    assert chat.safe
    joined = processor.tokenizer.convert_tokens_to_ids("ĊĊ")
    assert joined in processor.chat_encoder().whole_ids(chat.text)  # what the tokenizer makes of the whole text
    assert joined not in chat.ids
    prompt = processor.encode_chat(messages[:1], add_generation_prompt=True).ids
    assert chat.ids[: len(prompt)] == prompt
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert inputs["input_ids"][0] == processor.expand_images(chat.ids, chat.ids)
    assert inputs["pixel_values"][0].shape == (3, 8, 8)


def test_an_answer_without_a_question_is_refused() -> None:
    with pytest.raises(ChatError, match="begins with an answer"):
        build_processor("qwen", "chatml").encode_chat([BUS])


def test_an_empty_answer_in_the_history_of_a_prompt_is_possible() -> None:
    processor = build_processor("qwen", "chatml")
    messages = [ASKED, {"role": "assistant", "content": ""}, {"role": "user", "content": "Colour?"}]
    assert processor.tokenizer.decode(processor.prompt_ids(messages)).count("<|im_start|>assistant\n") == 2


def test_all_characters_of_private_use_are_too_many() -> None:
    everything = "".join(chr(code) for code in range(0xE000, 0xF900))
    processor = build_processor("qwen", "chatml")
    processor.encode_chat([{"role": "user", "content": everything[:-1] + "<|im_end|>"}])
    with pytest.raises(ChatError, match="private use"):
        processor.encode_chat([{"role": "user", "content": everything}])


@pytest.mark.parametrize("kind", ["llama_2", "llama_3"])
def test_a_batch_with_traps_is_laid_out_as_any_other(kind: str) -> None:
    processor = build_processor(kind, "vicuna_v1")
    plain = [[ASKED], [ASKED, BUS, {"role": "user", "content": "Colour?"}]]
    trapped = [[ASKED], [ASKED, BUS, TRAP]]
    theirs = ProcessorMixin.apply_chat_template(
        processor, plain, **BATCH, processor_kwargs={**LEFT, "return_mm_token_type_ids": True}
    )
    for conversations in (plain, trapped):
        ours = processor.apply_chat_template(
            conversations, **BATCH, processor_kwargs={**LEFT, "return_mm_token_type_ids": True}
        )
        assert {name: (type(value), value.dtype) for name, value in ours.items()} == {
            name: (type(value), value.dtype) for name, value in theirs.items()
        }
        for row, messages in enumerate(conversations):
            alone = processor.apply_chat_template(messages, **BATCH)["input_ids"][0]
            padding = len(ours["input_ids"][row]) - len(alone)
            assert torch.equal(ours["input_ids"][row, padding:], alone)
            assert ours["attention_mask"][row].tolist() == [0] * padding + [1] * len(alone)
        assert torch.equal(ours["mm_token_type_ids"] == 1, ours["input_ids"] == processor.image_token_id)
    assert ours["pixel_values"].shape == (3, 3, 8, 8)
    assert torch.equal(ours["pixel_values"][:2], theirs["pixel_values"])


def test_options_of_a_conversation_with_traps() -> None:
    processor = build_processor("llama_3", "chatml")
    ids = processor.apply_chat_template([TRAP], tokenize=True)
    assert ids == processor.apply_chat_template([TRAP], tokenize=True, return_dict=True)["input_ids"]
    padded = processor.apply_chat_template(
        [TRAP], tokenize=True, processor_kwargs={"text_kwargs": {"padding": "max_length", "max_length": 90}}
    )
    assert len(padded[0]) == 90
    with pytest.raises(ValueError, match="truncation"):
        processor.apply_chat_template([TRAP], tokenize=True, processor_kwargs={"truncation": True, "max_length": 4})
    unfinished = [TRAP, {"role": "assistant", "content": [{"type": "text", "text": "A </s>"}]}]
    ids = processor.apply_chat_template(unfinished, tokenize=True, continue_final_message=True)[0]
    assert processor.tokenizer.decode(ids).endswith("<|im_start|>assistant\nA </s>")
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_mask_of_answers_is_that_of_training(padding_side: str) -> None:
    processor = build_processor("qwen", "tokenizer")  # a template without marks for it
    conversations = [[ASKED, BUS], [TRAP, BUS, ASKED, BUS]]
    output = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )
    for row, count in enumerate((1, 2)):
        said = output["input_ids"][row][output["assistant_masks"][row].bool()]
        assert processor.tokenizer.decode(said) == "A bus.<|im_end|>" * count
