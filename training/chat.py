"""What a run checks about its chat template before it begins, and tells about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from defocus_mllm.chat_defocus import Chat, ChatError
from defocus_mllm.chat_templates import name_of
from training.conversations import Message
from training.encoding import message_parts

_QUESTION: Message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
_PROBES: list[list[Message]] = [
    [_QUESTION, {"role": "assistant", "content": "A bus, 3 m high."}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "Before </s> and behind"}, {"type": "image"}]},
        {"role": "assistant", "content": " <image> is a word here. "},
        {"role": "user", "content": "\nAnd the colour?\n"},
        {"role": "assistant", "content": "Red"},
    ],
]


@dataclass(frozen=True)
class ChatCheck:
    """What was found."""

    lines: list[str]
    """For the log."""
    facts: dict[str, Any]
    """For run.json."""


def check_chat(processor: Any, chosen: str, stage: str) -> ChatCheck:
    """Try the processor's chat template on dialogues, each answer's prompt against the training text, in text and ids.

    Args:
        processor: a `DefocusProcessor`.
        chosen: the argument `chat_template`, empty for the default.
        stage: "stage1" or "stage2", which inherits no `plain`.

    Raises ValueError, beginning with `chat_template`, if prompt and answer do not make up what is trained on, if no
    conversation can be written at all, or if the second stage would drop all questions without being asked to.
    """
    name = name_of(processor.chat_template, processor.image_token)
    if stage == "stage2" and name == "plain" and not chosen:
        raise ValueError(
            "chat_template: the model was trained with plain, which leaves out the questions; name the template of "
            "this stage, for example vicuna_v1"
        )
    try:
        chats = [_check_probe(processor, _PROBES[0])]
        _check_marks(processor, _PROBES[0], chats[0])
    except (ChatError, TemplateError) as error:
        raise ValueError(f"chat_template: {chosen or name} cannot write a question and its answer: {error}") from error
    lines = [f"chat template: {_origin(name, chosen, stage)}"]
    try:
        chats.append(_check_probe(processor, _PROBES[1]))
    except TemplateError as error:  # plain, and templates without a system message
        lines.append(f"chat template: a longer dialogue with a system message is refused: {error}")
    except ChatError as error:
        raise ValueError(f"chat_template: {chosen or name}: {error}") from error
    tokenizer = processor.tokenizer
    ends = list(dict.fromkeys(end for chat in chats for end in chat.ends))
    begins = chats[0].ids[0] == tokenizer.bos_token_id
    names = [None if end is None else tokenizer.convert_ids_to_tokens(end) for end in ends]
    lines += _describe(name, names, tokenizer.bos_token if begins else None)
    facts = {"name": chosen if name == "of its own" and chosen else name, "begin": begins, "ends": names}
    return ChatCheck(lines, facts)


def _check_probe(processor: Any, messages: list[Message]) -> Chat:
    """The dialogue, encoded; its beginning is the prompt of each of its answers."""
    whole = processor.encode_chat(messages)
    tokenizer = processor.tokenizer
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = processor.encode_chat(messages[:index], add_generation_prompt=True)
        length = len(prompt.ids)
        said = whole.answered[length - 1 : length + 1]
        if not whole.text.startswith(prompt.text) or whole.ids[:length] != prompt.ids or said != [False, True]:
            raise ChatError(f"the prompt {prompt.text!r} is not the beginning of the training text {whole.text!r}")
    begin = tokenizer.bos_token_id
    if begin not in (None, tokenizer.eos_token_id) and whole.ids[:2] == [begin, begin]:
        raise ChatError(f"the beginning token {tokenizer.bos_token!r} stands twice at the beginning; write it once")
    shown = sum(part["type"] == "image" for message in messages for part in message_parts(message))
    if whole.ids.count(processor.image_token_id) != shown:
        raise ChatError(f"the template writes {whole.ids.count(processor.image_token_id)} images for {shown}")
    return whole


def _check_marks(processor: Any, messages: list[Message], chat: Chat) -> None:
    """Raise ChatError if marks in the template say otherwise than the prompt of inference what an answer is."""
    if not processor.chat_encoder().has_marks:
        return
    picture = {"type": "image", "image": Image.new("RGB", (8, 8))}
    shown = [
        message | {"content": [picture if part["type"] == "image" else part for part in message_parts(message)]}
        for message in messages
    ]
    marked: Any = ProcessorMixin.apply_chat_template(
        processor, shown, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [bool(flag) for flag in marked["assistant_masks"][0]]
    if said != processor.expand_images(chat.ids, chat.answered):
        ids = [token for token, flag in zip(marked["input_ids"][0], said, strict=True) if flag]
        raise ChatError(
            f"its marks {{% generation %}} say that {processor.tokenizer.decode(ids)!r} is learnt, but generation goes "
            f"on behind {processor.encode_chat(messages[:1], add_generation_prompt=True).text[-20:]!r}; let both agree"
        )


def _origin(name: str, chosen: str, stage: str) -> str:
    if chosen:
        return chosen
    hint = "; LLaVA-1.5 trains this stage with --chat_template plain" if stage == "stage1" else ""
    return f"{name} (none was named{hint})"


def _describe(name: str, ends: list[str | None], begin: str | None) -> list[str]:
    """What is learnt at the end of answers, and what is left out."""
    lines = [f"an answer ends with {', '.join(end for end in ends if end)}" if any(ends) else _ENDLESS]
    lines.append(f"a conversation begins with {begin}" if begin else "a conversation begins without a beginning token")
    if name == "plain":
        lines.append("plain leaves out the text of all questions")
    return lines


_ENDLESS = "an answer ends without an end token: the model does not learn to stop"
