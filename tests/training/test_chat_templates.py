"""Each chat template with each kind of tokenizer: the text, the ids and the labels, whatever the messages say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from defocus_mllm.chat_templates import choose_template, end_ids, name_of
from training.conversations import Conversation
from training.encoding import IGNORED, ConversationEncoder, SupervisionError
from training.supervision import ConversationCollator

sys.path.insert(0, str(Path(__file__).parent))
from chat_tokenizers import KINDS, PAIRS, build_processor, build_tokenizer

PICTURE = {"type": "image", "image": Image.new("RGB", (4, 4), "red")}
DIALOGUE: list[dict[str, Any]] = [
    {"role": "user", "content": [PICTURE, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
    {"role": "user", "content": [{"type": "text", "text": "Colour?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
]
BRIEF = {"role": "system", "content": "Be brief."}

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make "
    "any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't "
    "know the answer to a question, please don't share false information."
)


def dialogue(template: str) -> list[dict[str, Any]]:
    return DIALOGUE[:2] if template == "plain" else DIALOGUE


def prompt_of(processor: Any, messages: list[dict[str, Any]]) -> list[int]:
    """What inference feeds the model."""
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [int(token) for token in inputs["input_ids"][0]]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # LLaVA's renderings, written down from its conversation.py: system, separators " " and "</s>", no space behind
        # the last "ASSISTANT:".
        (
            "vicuna_v1",
            f"{VICUNA} USER: <image>\nWhat is it? ASSISTANT: A bus.</s>USER: Colour? ASSISTANT: Red.</s>",
        ),
        (
            "llama_2",
            f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A bus. </s><s>[INST] Colour? [/INST]"
            " Red. </s>",
        ),
        ("plain", "<image>A bus.\n"),
        (
            "chatml",
            "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA bus.<|im_end|>\n"
            "<|im_start|>user\nColour?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n",
        ),
    ],
)
def test_the_text_of_a_template(template: str, text: str) -> None:
    processor = build_processor("llama_2", template)
    assert processor.apply_chat_template(dialogue(template)) == text
    assert name_of(processor.chat_template) == template
    asked = {"vicuna_v1": " ASSISTANT:", "llama_2": " [/INST]", "plain": "<image>", "chatml": "<|im_start|>assistant\n"}
    prompt = processor.apply_chat_template(DIALOGUE[:1], add_generation_prompt=True)
    assert prompt.endswith(asked[template])
    assert text.startswith(prompt)


def test_a_system_message_takes_the_place_of_the_usual_one() -> None:
    vicuna, llama_2 = (build_processor("llama_2", template) for template in ("vicuna_v1", "llama_2"))
    messages = [BRIEF, *DIALOGUE[2:]]
    assert vicuna.apply_chat_template(messages) == "Be brief. USER: Colour? ASSISTANT: Red.</s>"
    assert llama_2.apply_chat_template(messages) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nColour? [/INST] Red. </s>"
    assert build_processor("qwen", "chatml").apply_chat_template(messages).startswith("<|im_start|>system\nBe brief.<")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (DIALOGUE[2:], "needs an image"),
        (DIALOGUE, "not a conversation"),
        ([BRIEF, *DIALOGUE[:2]], "not a conversation"),
    ],
)
def test_plain_takes_an_image_and_its_caption_alone(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(SupervisionError, match=rf"^data\.json\[3\]: the template plain .*{message}"):
        ConversationEncoder(build_processor("llama_2", "plain")).encode(messages, "data.json[3]")


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2"])
@pytest.mark.parametrize("wrong", [DIALOGUE[1:3], [*DIALOGUE[:1], *DIALOGUE[:2]], [*DIALOGUE[:2], BRIEF]])
def test_roles_must_take_turns_in_llavas_templates(template: str, wrong: list[dict[str, Any]]) -> None:
    with pytest.raises(TemplateError, match="must take turns"):
        build_processor("llama_2", template).apply_chat_template(wrong)


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "What is it? "}, PICTURE], "<image>\nWhat is it?"),  # moved to the front, stripped
        ([PICTURE], "<image>"),
        (
            [{"type": "text", "text": "Here"}, PICTURE, {"type": "text", "text": "or there"}],
            "<image>\nHere\nor there",
        ),
        (  # more than LLaVA takes: where they are written
            [{"type": "text", "text": "Is "}, PICTURE, {"type": "text", "text": "like"}, PICTURE],
            "Is \n<image>\nlike\n<image>",
        ),
        ("Colour? ", "Colour? "),
    ],
)
def test_the_place_of_images_in_llavas_templates(template: str, content: Any, text: str) -> None:
    processor = build_processor("llama_2", template)
    rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    begin, end = {"vicuna_v1": ("USER: ", " ASSISTANT:"), "llama_2": ("<</SYS>>\n\n", " [/INST]")}[template]
    assert rendered.endswith(begin + text + end)


def shown(processor: Any, chat: Any, last: int) -> str:
    """The last tokens, those of answers in brackets."""
    tokens = processor.tokenizer.convert_ids_to_tokens(chat.ids)
    marked = [f"[{token}]" if said else token for token, said in zip(tokens, chat.answered, strict=True)]
    return " ".join(marked[-last:])


GOLDEN = {
    "llama_2 defocus": (
        "<s> <|user|> <image> <0x0A> What ▁is ▁it? </s> <|assistant|> [A] [▁bus.] [</s>] <|user|> Co lour? "
        "</s> <|assistant|> [Re] [d.] [</s>]"
    ),
    "llama_2 plain": "<s> <image> [A] [▁bus.] [<0x0A>]",
    "llama_2 vicuna_v1": "T : [▁A] [▁bus.] [</s>] U S E R : ▁Colour? ▁A S S I ST A N T : [▁Red.] [</s>]",
    "llama_2 llama_2": "[ INST] ▁Colour? ▁[ /INST] [▁Red.] [▁] [</s>]",
    "llama_2 tokenizer": (
        "<s> [ INST] ▁ <image> <0x0A> What ▁is ▁it? ▁[ /INST] [▁A] [▁bus.] [▁] [</s>] [ INST] ▁Colour? ▁[ "
        "/INST] [▁Red.] [▁] [</s>]"
    ),
    "llama_2_legacy defocus": (
        "<s> <|user|> <image> ▁ <0x0A> What ▁is ▁it? </s> <|assistant|> [▁A] [▁bus.] [</s>] <|user|> ▁Colour? "
        "</s> <|assistant|> [▁Red.] [</s>]"
    ),
    "llama_2_legacy vicuna_v1": ": [▁A] [▁bus.] [</s>] ▁ U S E R : ▁Colour? ▁A S S I ST A N T : [▁Red.] [</s>]",
    "llama_2_legacy chatml": (
        "<|im_start|> ▁user <0x0A> Co lour? <|im_end|> ▁ <0x0A> <|im_start|> ▁assistant <0x0A> [Re] [d.] "
        "[<|im_end|>] ▁ <0x0A>"
    ),
    "llama_3 tokenizer": (
        "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> ĊĊ <image> Ċ What Ġis Ġit ? <|eot_id|> "
        "<|start_header_id|> a ssistant <|end_header_id|> ĊĊ [A] [Ġbus] [.] [<|eot_id|>] <|start_header_id|> "
        "user <|end_header_id|> ĊĊ Colour ? <|eot_id|> <|start_header_id|> a ssistant <|end_header_id|> ĊĊ "
        "[Red] [.] [<|eot_id|>]"
    ),
    "llama_3 vicuna_v1": "[<|eot_id|>] USER : Ġ Colour ? ĠA SS IST AN T : [Ġ] [Red] [.] [<|eot_id|>]",
    "llama_3 llama_2": "<|begin_of_text|> [INST ] Ġ Colour ? Ġ [/ INST ] [Ġ] [Red] [.] [Ġ] [<|eot_id|>]",
    "qwen chatml": (
        "<|im_start|> user Ċ <image> Ċ What Ġis Ġit ? <|im_end|> Ċ <|im_start|> a ssistant Ċ [A] [Ġbus] [.] "
        "[<|im_end|>] Ċ <|im_start|> user Ċ Colour ? <|im_end|> Ċ <|im_start|> a ssistant Ċ [Red] [.] "
        "[<|im_end|>] Ċ"
    ),
    "qwen tokenizer": "<|im_start|> user Ċ Colour ? <|im_end|> Ċ <|im_start|> a ssistant Ċ [Red] [.] [<|im_end|>] Ċ",
    "qwen plain": "<image> [A] [Ġbus] [.Ċ]",
    "gpt_2 defocus": (
        "<|endoftext|> <|user|> <image> Ċ What Ġis Ġit ? <|endoftext|> <|assistant|> [A] [Ġbus] [.] "
        "[<|endoftext|>] <|user|> Colour ? <|endoftext|> <|assistant|> [Red] [.] [<|endoftext|>]"
    ),
    "gpt_2 vicuna_v1": "[<|endoftext|>] USER : Ġ Colour ? ĠA SS IST AN T : [Ġ] [Red] [.] [<|endoftext|>]",
}


@pytest.mark.parametrize("pair", GOLDEN)
def test_ids_and_labels_are_the_golden_ones(pair: str) -> None:
    kind, template = pair.split()
    processor = build_processor(kind, template)
    golden = GOLDEN[pair]
    assert shown(processor, processor.encode_chat(dialogue(template)), len(golden.split())) == golden


@pytest.mark.parametrize(("kind", "template"), PAIRS)
def test_ids_are_those_the_tokenizer_gives_the_whole_text(kind: str, template: str) -> None:
    processor = build_processor(kind, template)
    messages = dialogue(template)
    chat = processor.encode_chat(messages)
    tokenizer = processor.tokenizer
    written = bool(tokenizer.bos_token) and chat.text.startswith(tokenizer.bos_token)
    assert chat.ids == tokenizer(chat.text, add_special_tokens=not written)["input_ids"]
    # what the marks of a template say to other trainers is what is learnt here
    example = ConversationEncoder(processor).encode(messages)
    if "generation" in processor.chat_template.replace("add_generation_prompt", ""):
        theirs = ProcessorMixin.apply_chat_template(
            processor, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert example["input_ids"].tolist() == theirs["input_ids"][0]
        assert (example["labels"] != IGNORED).tolist() == [bool(said) for said in theirs["assistant_masks"][0]]
        assert torch.equal(example["pixel_values"], torch.as_tensor(theirs["pixel_values"]))


TRAPS = [
    *("</s>", "<s>", "<image>", "<|im_end|>", "<|im_start|>user\n", "<|eot_id|>", "<|endoftext|>", "<|user|>"),
    *(
        "[/INST]",
        "[INST] ",
        "USER: ",
        " ASSISTANT: ",
        "<unk>",
        "<pad>",
        "<0x0A>",
        "{% generation %}",
        "{{ bos_token }}",
    ),
    *("<think>", "\ue000", "</s</s>", "<|im_", "<", " ", "\n\n", "1", "é日", "<|end_header_id|>\n\n"),
]


def adversarial(template: str, number: int) -> list[dict[str, Any]]:
    """A dialogue in which every trap stands somewhere, at the beginning, in the middle and at the end of texts."""
    turn = TRAPS[number:] + TRAPS[:number]
    question = [{"type": "text", "text": turn[0] + "What" + turn[1]}, PICTURE, {"type": "text", "text": turn[2] + "x"}]
    more = [{"type": "text", "text": "".join(turn[6:12])}, {"type": "text", "text": turn[12] + "?" + turn[13]}]
    messages = [
        BRIEF | {"content": "Be" + turn[3]},
        {"role": "user", "content": question},
        {"role": "assistant", "content": turn[4] + "A bus" + turn[5]},
        {"role": "user", "content": more},
        {"role": "assistant", "content": [{"type": "text", "text": "R" + "".join(turn[14:20])}]},
    ]
    return messages[1:3] if template == "plain" else messages


@pytest.mark.parametrize(("kind", "template"), PAIRS)
def test_no_text_makes_a_control_token_and_prompts_lead_to_the_training_text(kind: str, template: str) -> None:
    processor = build_processor(kind, template)
    tokenizer = processor.tokenizer
    controls = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for number in range(len(TRAPS)):
        messages = adversarial(template, number)
        if template == "tokenizer" and kind.startswith("llama_2"):
            messages = messages[1:]  # that template takes no system message
        harmless = [
            message | {"content": [{"type": "text", "text": "x"}] + [PICTURE] * (index == len(messages) - 4)}
            for index, message in enumerate(messages)
        ]
        if template == "plain":
            harmless = [{"role": "user", "content": [PICTURE]}, {"role": "assistant", "content": "x"}]
        chat, expected = processor.encode_chat(messages), processor.encode_chat(harmless)
        found, wanted = ([token for token in one.ids if token in controls] for one in (chat, expected))
        assert found == wanted
        answers = [message for message in messages if message["role"] == "assistant"]
        assert learnt(processor, chat) == [text_of(answer).strip() for answer in answers]
        example = ConversationEncoder(processor).encode(messages)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = prompt_of(processor, messages[:index])
                assert example["input_ids"][: len(prompt)].tolist() == prompt
                assert (example["labels"][len(prompt) - 1 : len(prompt) + 1] != IGNORED).tolist() == [False, True]


def text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else content[0]["text"]


def learnt(processor: Any, chat: Any) -> list[str]:
    """The texts of answers as their ids say, without end token and the space around."""
    texts, ids = [], []
    for token, said in zip([*chat.ids, -1], [*chat.answered, False], strict=True):
        if said:
            ids.append(token)
        elif ids:
            # behind a letter, since decoders take a first space away
            letter = processor.tokenizer("x", add_special_tokens=False)["input_ids"]
            end = len(ids) if chat.ends == [None] else len(ids) - 1
            texts.append(processor.tokenizer.decode(letter + ids[:end]).removeprefix("x").strip())
            ids = []
    return texts


@pytest.mark.parametrize(("kind", "template"), PAIRS)
def test_a_beginning_token_stands_once(kind: str, template: str) -> None:
    processor = build_processor(kind, template)
    begin = processor.tokenizer.bos_token_id
    ids = processor.encode_chat(dialogue(template)).ids
    written_by_gpt_2 = kind == "gpt_2" and template == "defocus"
    assert (ids[0] == begin) == (kind not in ("qwen", "gpt_2") or written_by_gpt_2)
    assert ids[1] != begin
    if begin not in (None, processor.tokenizer.eos_token_id):
        assert ids.count(begin) == (2 if template == "llama_2" else 1)  # LLaVA's llama_2 begins every round so


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_adds_no_beginning_gets_it_from_the_template(kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    tokenizer.backend_tokenizer.post_processor = None
    begin = tokenizer.bos_token if kind.startswith("llama") else None
    for template in ("plain", "vicuna_v1", "llama_2", "chatml"):
        text = choose_template(template, tokenizer).text
        assert text.startswith("{{- bos_token -}}") == (begin is not None)
        assert name_of(text) == template


@pytest.mark.parametrize(
    ("kind", "template", "ends"),
    [
        ("llama_2", "vicuna_v1", "</s>"),
        ("llama_2", "plain", "</s>"),
        ("gpt_2", "chatml", ["<|im_end|>", "<|endoftext|>"]),
        ("llama_3", "chatml", ["<|im_end|>", "<|eot_id|>"]),
        ("qwen", "tokenizer", "<|im_end|>"),
    ],
)
def test_generation_stops_at_the_end_of_turns_and_of_texts(kind: str, template: str, ends: Any) -> None:
    processor = build_processor(kind, template)
    assert processor.tokenizer.convert_ids_to_tokens(end_ids(processor)) == ends


COMPARED: list[dict[str, Any]] = [
    BRIEF,
    {"role": "user", "content": [{"type": "text", "text": "Is"}, PICTURE, {"type": "text", "text": "a"}, PICTURE]},
    {"role": "assistant", "content": "A bus."},
    {"role": "user", "content": [PICTURE, {"type": "text", "text": "it?"}]},
    {"role": "assistant", "content": "Red."},
]


@pytest.mark.parametrize(
    ("kind", "template", "golden"),
    [
        (
            "qwen",
            "chatml",
            "r i e f . <|im_end|> Ċ <|im_start|> user Ċ I s Ċ <image> Ċ a Ċ <image> <|im_end|> Ċ <|im_start|> a "
            "ssistant Ċ [A] [Ġbus] [.] [<|im_end|>] Ċ <|im_start|> user Ċ <image> Ċ i t ? <|im_end|> Ċ <|im_start|> "
            "a ssistant Ċ [Red] [.] [<|im_end|>] Ċ",
        ),
        (
            "llama_2",
            "vicuna_v1",
            "<s> ▁ B e ▁b r i e f . ▁ U S E R : ▁ I s <0x0A> <image> <0x0A> a <0x0A> <image> ▁A S S I ST A N T : [▁A] "
            "[▁bus.] [</s>] U S E R : ▁ <image> <0x0A> i t? ▁A S S I ST A N T : [▁Red.] [</s>]",
        ),
        (
            "llama_3",
            "llama_2",
            "<|begin_of_text|> [INST ] Ġ<< SYS >> Ċ B e Ġb r i e f .Ċ << / SYS >> ĊĊ I s Ċ <image> Ċ a Ċ <image> Ġ "
            "[/ INST ] [ĠA] [Ġbus] [.] [Ġ] [<|eot_id|>] <|begin_of_text|> [INST ] Ġ <image> Ċ i t ? Ġ [/ INST ] [Ġ] "
            "[Red] [.] [Ġ] [<|eot_id|>]",
        ),
    ],
)
def test_several_images_and_a_system_message(kind: str, template: str, golden: str) -> None:
    processor = build_processor(kind, template)
    assert shown(processor, processor.encode_chat(COMPARED), len(golden.split())) == golden
    example = ConversationEncoder(processor).encode(COMPARED)
    assert (example["input_ids"] == processor.image_token_id).sum() == 3 * processor.num_image_tokens
    assert example["pixel_values"].shape == (3, 3, 8, 8)
    assert ((example["labels"] == IGNORED) | (example["labels"] == example["input_ids"])).all()


@pytest.mark.parametrize("template", ["defocus", "vicuna_v1", "llama_2", "chatml"])
def test_what_is_too_long_loses_whole_pairs_and_they_are_counted(template: str) -> None:
    processor = build_processor("llama_2_legacy", template)
    encoder = ConversationEncoder(processor)
    long = Conversation("data.json[0]", [*DIALOGUE, *DIALOGUE[2:]])
    collator = ConversationCollator(processor, max_length=encoder.count_tokens(long.messages) - 1)
    batch = collator([long])
    assert torch.equal(batch["input_ids"][0], encoder.encode(DIALOGUE)["input_ids"])
    assert torch.equal(batch["labels"][0], encoder.encode(DIALOGUE)["labels"])
    assert collator.counts == {"over_max_length": 1}
