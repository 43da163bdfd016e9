"""Messages to tokens and labels, segment by segment.

A chat template says which of its text is the assistant's (`{% generation %}`). Each message becomes a run of tokens
with its labels, and a conversation is the runs in a row. Nothing is searched for in a finished prompt, so nothing that
a user or an answer says can move the labels: the text `</s>` or `<image>` inside a message is encoded as the ordinary
characters it is written with.

The result equals `processor.apply_chat_template(...)`, the prompt of inference. That is checked on a probe for every
processor; a template for which it does not hold (one whose messages depend on their neighbours) is rendered whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from PIL import Image

from defocus_mllm.images import ImageError
from training.conversations import Message
from training.images import PixelLoader

IGNORED = -100
"""Label of a token that is not learnt."""

Example = dict[str, torch.Tensor]

_SLOT = "\ue000text\ue001"
_MOST_CACHED_MESSAGES = 50_000


class SupervisionError(ValueError):
    """A conversation from which no training example can be made; the message names it."""


def encoder_for(processor: Any) -> ConversationEncoder:
    """The encoder of a processor, made once for each processor and template."""
    return _cached_encoder(processor, processor.chat_template)


@lru_cache(maxsize=4)
def _cached_encoder(processor: Any, chat_template: str) -> ConversationEncoder:
    return ConversationEncoder(processor)


@dataclass(frozen=True)
class _Segment:
    """A stretch of a rendered message: one special token, or text with the message's texts in its slots."""

    text: str
    token_id: int | None
    """Of a special token; None for text."""
    supervised: bool = False


@dataclass(frozen=True)
class _Tokens:
    ids: list[int]
    labels: list[int]


class ConversationEncoder:
    """Encodes conversations for one processor and remembers messages and pictures it has seen.

    Args:
        processor: a `DefocusProcessor`.
        image_cache_bytes: memory for decoded pictures.
    """

    def __init__(self, processor: Any, image_cache_bytes: int = 512 * 1024**2) -> None:
        self.processor = processor
        self.pixels = PixelLoader(processor.image_processor, image_cache_bytes)
        added = {token.content: token_id for token_id, token in processor.tokenizer.added_tokens_decoder.items()}
        self._special_tokens = added
        self._special_pattern = re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)))
        self._structures: dict[tuple[str, tuple[str, ...], bool], list[_Segment]] = {}
        self._messages: dict[tuple[str, tuple[str, ...], bool], _Tokens] = {}
        self.by_segments = self._segments_equal_template()
        """False for a template that has to be rendered as a whole, which is slower."""

    def encode(self, messages: list[Message], record: str = "the conversation") -> Example:
        """See `encode_conversation`."""
        tokens = self._tokens(messages, record)
        if all(label == IGNORED for label in tokens.labels):
            raise SupervisionError(f"{record} has no token to learn; it needs an answer the chat template marks")
        example = {
            "input_ids": torch.tensor(tokens.ids),
            "attention_mask": torch.ones(len(tokens.ids), dtype=torch.long),
            "labels": torch.tensor(tokens.labels),
        }
        images = [part["image"] for message in messages for part in message_parts(message) if part["type"] == "image"]
        if images:
            example["pixel_values"] = torch.stack([self._pixel_values(image, record) for image in images])
        return example

    def count_tokens(self, messages: list[Message], record: str = "the conversation") -> int:
        """Length of the example, image tokens included, without opening an image."""
        return len(self._tokens(messages, record).ids)

    def _pixel_values(self, image: Any, record: str) -> torch.Tensor:
        if isinstance(image, Image.Image):
            return self.pixels.process(image)
        try:
            return self.pixels(image)
        except (ImageError, FileNotFoundError) as error:
            raise type(error)(f"{record}: {error}") from error

    def _tokens(self, messages: list[Message], record: str) -> _Tokens:
        if not self.by_segments:
            self._refuse_special_text(messages, record)
            return self._render_whole(messages)
        ids: list[int] = []
        labels: list[int] = []
        for index, message in enumerate(messages):
            tokens = self._message_tokens(message, first=index == 0)
            ids += tokens.ids
            labels += tokens.labels
        return _Tokens(ids, labels)

    # --- segment by segment ---------------------------------------------------------------------------------------

    def _message_tokens(self, message: Message, first: bool) -> _Tokens:
        parts = message_parts(message)
        content = tuple(part["type"] if part["type"] != "text" else "text:" + part["text"] for part in parts)
        key = (message["role"], content, first)
        tokens = self._messages.get(key)
        if tokens is None:
            if len(self._messages) >= _MOST_CACHED_MESSAGES:
                self._messages.clear()
            tokens = self._messages[key] = self._encode_message(message["role"], parts, first)
        return tokens

    def _encode_message(self, role: str, parts: list[dict[str, Any]], first: bool) -> _Tokens:
        texts = iter([part["text"] for part in parts if part["type"] == "text"])
        ids: list[int] = []
        labels: list[int] = []
        for segment in self._structure(role, tuple(part["type"] for part in parts), first):
            segment_ids = self._segment_ids(segment, texts)
            ids += segment_ids
            labels += segment_ids if segment.supervised else [IGNORED] * len(segment_ids)
        return _Tokens(ids, labels)

    def _segment_ids(self, segment: _Segment, texts: Iterator[str]) -> list[int]:
        if segment.token_id is not None:
            copies = self.processor.num_image_tokens if segment.token_id == self.processor.image_token_id else 1
            return [segment.token_id] * copies
        first, *others = segment.text.split(_SLOT)
        return self._plain_ids(first + "".join(next(texts) + other for other in others))

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of text as text: what looks like a special token in it is not one."""
        return self.processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _structure(self, role: str, part_types: tuple[str, ...], first: bool) -> list[_Segment]:
        """What the template makes of a message with these parts, each text replaced by a slot."""
        key = (role, part_types, first)
        if key not in self._structures:
            content = [{"type": kind} | ({"text": _SLOT} if kind == "text" else {}) for kind in part_types]
            message = {"role": role, "content": content}
            rendered = self.processor.apply_chat_template([message], tokenize=False)
            segments = self._cut(rendered)
            if role == "assistant":
                segments = self._mark_supervised(segments, message)
            begin = self.processor.tokenizer.bos_token_id
            if not first and segments and segments[0].token_id == begin is not None:
                segments = segments[1:]
            self._structures[key] = segments
        return self._structures[key]

    def _cut(self, rendered: str) -> list[_Segment]:
        """Cut at the special tokens, which here are all the template's own."""
        segments, position = [], 0
        for match in self._special_pattern.finditer(rendered):
            if match.start() > position:
                segments.append(_Segment(rendered[position : match.start()], None))
            segments.append(_Segment(match.group(), self._special_tokens[match.group()]))
            position = match.end()
        if position < len(rendered):
            segments.append(_Segment(rendered[position:], None))
        return segments

    def _mark_supervised(self, segments: list[_Segment], message: Message) -> list[_Segment]:
        """Read off the template's own mask which segments the assistant says."""
        whole = self._render_whole([message])
        marked, position = [], 0
        for segment in segments:
            slots = iter([_SLOT] * segment.text.count(_SLOT))
            end = position + len(self._segment_ids(segment, slots))
            supervised = {label != IGNORED for label in whole.labels[position:end]}
            if len(supervised) != 1:
                raise _NotBySegmentsError
            marked.append(_Segment(segment.text, segment.token_id, supervised.pop()))
            position = end
        return marked

    # --- the template as a whole ----------------------------------------------------------------------------------

    def _render_whole(self, messages: list[Message]) -> _Tokens:
        """Tokens and labels from the processor's own rendering and assistant mask; pictures are blank stand-ins."""
        blank = Image.new("RGB", (8, 8))
        stand_ins = [
            message
            | {
                "content": [
                    part | {"image": blank} if part["type"] == "image" else part for part in message_parts(message)
                ]
            }
            for message in messages
        ]
        output = self.processor.apply_chat_template(
            stand_ins, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = output["input_ids"], output["assistant_masks"]
        if len(ids) == 1 and not isinstance(ids[0], int):
            ids, mask = ids[0], mask[0]
        ids = [int(token) for token in ids]
        return _Tokens(ids, [token if said else IGNORED for token, said in zip(ids, mask, strict=True)])

    def _segments_equal_template(self) -> bool:
        dialogue = [
            _message("user", {"type": "image"}, {"type": "text", "text": "What is this?"}),
            _message("assistant", {"type": "text", "text": " A bus, 3 m high. "}),  # some templates trim
            _message("user", {"type": "text", "text": "\nAnd the colour?\n"}),
            _message("assistant", {"type": "text", "text": "Red"}),
        ]
        system = _message("system", {"type": "text", "text": "Answer briefly."})
        self.by_segments = True
        try:
            return all(
                self._tokens(probe, "the probe") == self._render_whole(probe)
                for probe in (dialogue, [system, *dialogue])
            )
        except (_NotBySegmentsError, TemplateError):
            return False

    def _refuse_special_text(self, messages: list[Message], record: str) -> None:
        for message in messages:
            for part in message_parts(message):
                if part["type"] == "text" and (found := self._special_pattern.search(part["text"])):
                    raise SupervisionError(
                        f"{record}: the text holds {found.group()!r}, a special token of this tokenizer; remove it"
                    )


class _NotBySegmentsError(Exception):
    """The template's assistant mask begins or ends inside a stretch of text."""


def _message(role: str, *parts: dict[str, Any]) -> Message:
    return {"role": role, "content": list(parts)}


def message_parts(message: Message) -> list[dict[str, Any]]:
    """The message's content as a list of parts; a plain string is one text part."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
