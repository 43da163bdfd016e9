"""Messages to tokens, labels and pixels: a training example.

Tokens and what is learnt of them come from `processor.encode_chat`, which inference uses too: an answer is what the
chat template writes behind the prompt that leads to it, up to and with the end of the turn. Nothing is searched for in
a finished prompt, so nothing that a user or an answer says can move the labels, and the text `</s>` or `<image>` inside
a message is encoded as the ordinary characters it is written with.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from PIL import Image

from defocus_mllm.chat_defocus import Chat, ChatError, message_texts
from defocus_mllm.images import ImageError
from training.conversations import Message
from training.images import PixelLoader

IGNORED = -100
"""Label of a token that is not learnt."""

Example = dict[str, torch.Tensor]


class SupervisionError(ValueError):
    """A conversation from which no training example can be made; the message names it."""


def encoder_for(processor: Any) -> ConversationEncoder:
    """The encoder of a processor, made once for each processor and template."""
    return _cached_encoder(processor, processor.chat_template)


@lru_cache(maxsize=4)
def _cached_encoder(processor: Any, chat_template: str) -> ConversationEncoder:
    return ConversationEncoder(processor)


class ConversationEncoder:
    """Encodes conversations for one processor and remembers pictures it has seen.

    Args:
        processor: a `DefocusProcessor`.
        image_cache_bytes: memory for decoded pictures.
    """

    def __init__(self, processor: Any, image_cache_bytes: int = 512 * 1024**2) -> None:
        self.processor = processor
        self.pixels = PixelLoader(processor.image_processor, image_cache_bytes)

    def encode(self, messages: list[Message], record: str = "the conversation") -> Example:
        """See `encode_conversation`."""
        chat = self._chat(messages, record)
        if not any(chat.answered):
            raise SupervisionError(f"{record} has no token to learn; it needs an answer")
        said = [token if answered else IGNORED for token, answered in zip(chat.ids, chat.answered, strict=True)]
        ids = torch.tensor(self.processor.expand_images(chat.ids, chat.ids))
        example = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor(self.processor.expand_images(chat.ids, said)),
        }
        if images := _images(messages):
            example["pixel_values"] = torch.stack([self._pixel_values(image, record) for image in images])
        return example

    def count_tokens(self, messages: list[Message], record: str = "the conversation") -> int:
        """Length of the example, image tokens included, without opening an image."""
        ids = self._chat(messages, record).ids
        return len(ids) + ids.count(self.processor.image_token_id) * (self.processor.num_image_tokens - 1)

    def _chat(self, messages: list[Message], record: str) -> Chat:
        for message in messages:
            if message["role"] == "assistant" and not "".join(message_texts(message)).strip():
                raise SupervisionError(f"{record}: an answer is empty; fill it in or remove the pair")
        try:
            chat = self.processor.encode_chat(messages)
        except (ChatError, TemplateError) as error:
            raise SupervisionError(f"{record}: {error}") from error
        shown, written = len(_images(messages)), chat.ids.count(self.processor.image_token_id)
        if shown != written:
            raise SupervisionError(f"{record}: the chat template writes {written} images, but there are {shown}")
        return chat

    def _pixel_values(self, image: Any, record: str) -> torch.Tensor:
        if isinstance(image, Image.Image):
            return self.pixels.process(image)
        try:
            return self.pixels(image)
        except (ImageError, FileNotFoundError) as error:
            raise type(error)(f"{record}: {error}") from error


def _images(messages: list[Message]) -> list[Any]:
    return [part.get("image") for message in messages for part in message_parts(message) if part["type"] == "image"]


def message_parts(message: Message) -> list[dict[str, Any]]:
    """The message's content as a list of parts; a plain string is one text part."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
