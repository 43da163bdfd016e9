"""From a task's chat messages to a request: text and pictures in any order, earlier turns, a system message.

Messages are in the form that lmms-eval's tasks give to chat models: a list of {"role", "content"}, where content is a
list of {"type": "text", "text"} and {"type": "image", "url"}, and `url` a picture in memory or the path of a file.
Nothing here imports lmms-eval.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from defocus_mllm.images import to_rgb
from eval.generator import LoadImage, Request

ROLES = ("system", "user", "assistant")
_REMOTE = ("http://", "https://", "file://", "s3://", "gs://", "data:")


@dataclass(frozen=True)
class ChatRequest(Request):
    """A request whose pictures are loaded when its batch is encoded, so that a whole task's never fill the memory.

    `images` name the pictures: the path of a file, or the digest of a picture in memory, so that equal pictures are
    encoded once.
    """

    messages: Callable[[], Sequence[dict[str, Any]]] = tuple
    """Gives the task's messages anew at every call."""

    @classmethod
    def of(cls, identifier: str, messages: Callable[[], Sequence[dict[str, Any]]]) -> ChatRequest:
        """The request that these messages make; `identifier` opens the message of every error.

        Raises:
            ValueError: a message cannot be understood, or holds what the model does not take (audio, video, pictures
                on the internet).
        """
        turns = [_Turn.of(message, identifier) for message in messages()]
        if not turns or turns[-1].role != "user":
            raise ValueError(
                f"{identifier}: the last message must be the user's, found {[turn.role for turn in turns]}"
            )
        texts = [part for turn in turns for part in turn.parts if isinstance(part, str)]
        return cls(identifier, "\n".join(texts), _names(turns), (), messages)

    def conversation(self, load: LoadImage) -> list[dict[str, Any]]:
        """The messages for a chat template, with pictures loaded.

        Raises:
            ValueError: the task gives other pictures now than when the request was made.
            ImageError: a picture cannot be used.
        """
        turns = [_Turn.of(message, self.id) for message in self.messages()]
        if _names(turns) != self.images:
            raise ValueError(f"{self.id}: its task gives other pictures at every call; it must not draw them at random")
        return [{"role": turn.role, "content": turn.content(load)} for turn in turns]


@dataclass(frozen=True)
class _Turn:
    role: str
    parts: tuple[str | Path | Image.Image, ...]

    @classmethod
    def of(cls, message: dict[str, Any], where: str) -> _Turn:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, list):
            raise ValueError(
                f"{where}: a message needs a role of {', '.join(ROLES)} and a list as content, found role {role!r} and "
                f"{type(content).__name__}"
            )
        return cls(role, tuple(_part(entry, where) for entry in content))

    def content(self, load: LoadImage) -> list[dict[str, Any]]:
        return [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": load(part) if isinstance(part, Path) else part}
            for part in self.parts
        ]


def _part(entry: dict[str, Any], where: str) -> str | Path | Image.Image:
    kind = entry.get("type")
    if kind == "text" and isinstance(entry.get("text"), str):
        return str(entry["text"])
    if kind != "image":
        raise ValueError(f"{where}: the model takes text and images, not {kind!r}")
    source = entry.get("url")
    if isinstance(source, Image.Image):
        return to_rgb(ImageOps.exif_transpose(source), f"of {where}")
    if isinstance(source, str) and not source.startswith(_REMOTE):
        return Path(source).absolute()
    found = source[:40] if isinstance(source, str) else type(source).__name__
    raise ValueError(f"{where}: an image must be a picture in memory or the path of a file, found {found!r}")


def _names(turns: Sequence[_Turn]) -> tuple[Path, ...]:
    pictures = [part for turn in turns for part in turn.parts if not isinstance(part, str)]
    return tuple(part if isinstance(part, Path) else Path(_digest(part)) for part in pictures)


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
