"""One record of any of the known formats, checked and made structured messages.

LLaVA: `{"id": 7, "image": "coco/000.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "A bus."}]}`; `image` may be absent (text only) or a list. OpenAI and Hugging Face: `messages`
with `role` and `content`, a text or a list of parts `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`,
`{"type": "image_url", "image_url": {"url": ...}}`; an image part that names nothing takes the next of `images`.
Unknown keys are ignored.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote

from training.records import shorten

PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRecord(ValueError):
    """A record that cannot be trained on; the message names it and says how to mend it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """The kind of problem in a few words, for counting."""


class ImageReference(NamedTuple):
    """Where a picture is; its fields are a row of the index's column `images`."""

    path: str | None = None
    """Its file as the record names it or, of a picture inside a shard, the shard."""
    offset: int | None = None
    """Byte of the shard at which the picture begins; without `path`: its place among the images of a table's row."""
    size: int | None = None
    """Its bytes in the shard."""
    bytes: bytes | None = None
    """The picture itself, if it stands in the record."""


@dataclass
class Turn:
    """What one side says at once: texts and images (None: the next of those the record lists)."""

    role: str
    parts: list[str | ImageReference | None]

    @property
    def is_empty(self) -> bool:
        """Whether there is neither an image nor a character that is not white space."""
        return not any(part.strip() if isinstance(part, str) else True for part in self.parts)

    @property
    def images(self) -> list[ImageReference | None]:
        """The image parts."""
        return [part for part in self.parts if not isinstance(part, str)]


@dataclass
class CheckedRecord:
    """A conversation that can be trained on."""

    messages: list[dict[str, Any]]
    """Hugging Face structured messages; the image parts hold nothing yet: `{"type": "image"}`."""
    images: list[ImageReference]
    """The images in the order of their parts."""
    repairs: list[str] = field(default_factory=list)
    """What was mended, each kind of repair once."""


def check_record(
    record: Any, name: str, embedded: Sequence[ImageReference] | None = None, repair: bool = False
) -> CheckedRecord:
    """Raises `BadRecord`, whose message begins with `name`.

    Args:
        record: an object as JSON gives it.
        name: how messages call it.
        embedded: the record's images where they do not stand in it; None: its `image` or `images` names them.
        repair: mend what LLaVA's own files are known to have, instead of refusing it: an answer before the first
            question, a question after the last answer, several turns of one side in a row, an empty text (its pair is
            left out), images without a placeholder (they go before the first question).
    """
    if not isinstance(record, dict):
        raise BadRecord("not an object", f"{name}: is a {type(record).__name__}, not a JSON object")
    listed = _listed_images(record, name) if embedded is None else [_checked(image, name) for image in embedded]
    repairs: list[str] = []
    turns = _turns(record, name)
    if repair:
        turns, repairs = _mended(turns, len(listed), name)
    _check_order(turns, name)
    images = _assigned_images(turns, listed, name)
    messages = [{"role": turn.role, "content": [_part(part) for part in turn.parts]} for turn in turns]
    return CheckedRecord(messages, images, repairs)


def shown(value: Any) -> str:
    """A value of a record for a message: short, in one line."""
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else shorten(repr(value))


def _part(part: str | ImageReference | None) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


# --- images -----------------------------------------------------------------------------------------------------------


def _listed_images(record: dict[str, Any], name: str) -> list[ImageReference]:
    """Those that `image` or `images` names: a path or a list of paths, or the same as `data:` URLs."""
    given = [key for key in ("image", "images") if record.get(key) is not None]
    if len(given) > 1:
        raise BadRecord("image is no path", f'{name}: has both "image" and "images"; keep one')
    value = record[given[0]] if given else []
    return [_reference(image, name) for image in (value if isinstance(value, list) else [value])]


def _checked(image: ImageReference, name: str) -> ImageReference:
    return image if image.path is None or image.size is not None else _reference(image.path, name)


def _reference(image: Any, name: str) -> ImageReference:
    """A path as it is written, or the bytes of a `data:` URL."""
    if not isinstance(image, str) or not image.strip():
        raise BadRecord("image is no path", f"{name}: image must be a path or a list of paths, not {shown(image)}")
    if image.startswith("data:"):
        return ImageReference(bytes=_decoded(image, name))
    scheme, separator, rest = image.partition("://")
    if separator and scheme.lower() != "file":
        raise BadRecord(
            "image is a URL", f"{name}: image {shown(image)} is not on this machine; download it and name the file"
        )
    path = unquote(rest) if separator else image
    if "\0" in path or _not_unicode(path):
        raise BadRecord("image is no path", f"{name}: image {shown(image)} holds characters that no file name has")
    if "\\" in path:
        raise BadRecord("backslash in a path", f"{name}: image {shown(image)} has a backslash; write / between folders")
    return ImageReference(path=path)


def _decoded(url: str, name: str) -> bytes:
    head, separator, data = url.partition(",")
    try:
        if not separator or not head.endswith(";base64"):
            raise ValueError("it must be data:image/...;base64,...")
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise BadRecord("image URL malformed", f"{name}: the image's data URL cannot be decoded: {error}") from error


def _assigned_images(turns: Sequence[Turn], listed: list[ImageReference], name: str) -> list[ImageReference]:
    """The image of each image part, in order: its own, or the next one listed."""
    parts = [image for turn in turns for image in turn.images]
    open_places = parts.count(None)
    if open_places != len(listed):
        raise BadRecord(
            "<image> count",
            f"{name}: {open_places} {PLACEHOLDER} in the text but {len(listed)} image(s); write one for each image",
        )
    waiting = iter(listed)
    return [next(waiting) if image is None else image for image in parts]


# --- turns ------------------------------------------------------------------------------------------------------------


def _turns(record: dict[str, Any], name: str) -> list[Turn]:
    key = "conversations" if record.get("conversations") is not None else "messages"
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRecord("no conversation", f'{name}: needs a non-empty list "conversations" or "messages"')
    return [_turn(turn, f"{name}, {key}[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: Any, name: str) -> Turn:
    if not isinstance(turn, dict):
        raise BadRecord("turn is no object", f'{name}: must be an object with "from" and "value", not {shown(turn)}')
    role = turn["from"] if turn.get("from") is not None else turn.get("role")
    content = turn["value"] if turn.get("value") is not None else turn.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRecord("unknown role", f'{name}: "from" must be one of {", ".join(_ROLES)}, not {shown(role)}')
    if isinstance(content, str):
        parts = _split(content)
    elif isinstance(content, list):
        parts = [_content_part(part, name) for part in content]
    else:
        raise BadRecord("text missing", f'{name}: "value" must be a string, not {shown(content)}')
    checked = Turn(_ROLES[role], [part for part in parts if part != ""])
    if checked.images and checked.role != "user":
        raise BadRecord(
            "<image> outside a human turn",
            f"{name}: {PLACEHOLDER} stands in a {checked.role} turn; only human turns show images",
        )
    if any(isinstance(part, str) and _not_unicode(part) for part in parts):
        raise BadRecord("text is not Unicode", f"{name}: the text holds half a surrogate pair; write it anew as UTF-8")
    return checked


def _content_part(part: Any, name: str) -> str | ImageReference | None:
    """A part of OpenAI's or Hugging Face's `content`. Its text is text, whatever stands in it."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "image_url"):
        raise BadRecord("unknown part", f"{name}: a part must be of type text, image or image_url, not {shown(part)}")
    found = [part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None]
    value = found[0] if found else None
    if isinstance(value, dict):
        value = value.get("url")
    elif value is None and kind == "image":
        return None
    return _reference(value, name)


def _split(text: str) -> list[str | ImageReference | None]:
    """Texts and, for each placeholder, None.

    The template puts a line break between parts, so the one that is written beside a placeholder is taken away.
    """
    parts: list[str | ImageReference | None] = []
    pieces = text.split(PLACEHOLDER)
    for index, piece in enumerate(pieces):
        if index > 0:
            parts.append(None)
            piece = piece.removeprefix("\n")
        if index < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append(piece)
    return parts


def _not_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _check_order(turns: Sequence[Turn], name: str) -> None:
    """An optional system turn, then user and assistant in alternation, and all of them say something."""
    roles = [turn.role for turn in turns]
    dialogue = roles[1:] if roles[0] == "system" else roles
    if dialogue != ["user", "assistant"] * (max(len(dialogue), 2) // 2):
        shown_roles = shorten(", ".join(roles))
        raise BadRecord(
            "turns out of order",
            f"{name}: the roles are {shown_roles}; needed: human and gpt in turn, human first, gpt last",
        )
    for index, turn in enumerate(turns):
        if turn.is_empty:
            raise BadRecord(
                "empty text",
                f'{name}, turn {index}: the text of "{turn.role}" is empty; fill it in or remove the pair',
            )


# --- repairs ----------------------------------------------------------------------------------------------------------


def _mended(turns: list[Turn], num_listed: int, name: str) -> tuple[list[Turn], list[str]]:
    repairs: list[str] = []
    system = [turn for turn in turns[:1] if turn.role == "system"]
    dialogue = turns[len(system) :]
    if system and system[0].is_empty:
        system = []
        repairs.append("empty system text left out")
    while dialogue and dialogue[0].role == "assistant":
        dialogue = dialogue[1:]
        repairs.append("leading answer left out")
    dialogue = _merged(dialogue, repairs)
    if dialogue and dialogue[-1].role == "user" and not dialogue[-1].images:
        dialogue = dialogue[:-1]
        repairs.append("trailing question left out")
    dialogue = _without_empty_pairs(dialogue, repairs)
    if not dialogue:
        raise BadRecord("no answer", f"{name}: there is no question with an answer")
    if num_listed and not any(turn.images for turn in dialogue):
        dialogue[0] = Turn(dialogue[0].role, [*[None] * num_listed, *dialogue[0].parts])
        repairs.append(f"{PLACEHOLDER} written before the first question")
    return system + dialogue, list(dict.fromkeys(repairs))


def _merged(dialogue: list[Turn], repairs: list[str]) -> list[Turn]:
    """Turns of one side in a row as one; the template puts a line break between its parts."""
    merged: list[Turn] = []
    for turn in dialogue:
        if merged and merged[-1].role == turn.role:
            merged[-1] = Turn(turn.role, merged[-1].parts + turn.parts)
            repairs.append("turns of one side joined")
        else:
            merged.append(turn)
    return merged


def _without_empty_pairs(dialogue: list[Turn], repairs: list[str]) -> list[Turn]:
    """Images of a question that goes stay, before the next question that does not."""
    kept: list[Turn] = []
    homeless: list[str | ImageReference | None] = []
    pairs = zip(dialogue[::2], dialogue[1::2], strict=False)
    for question, answer in pairs:
        if (question.role, answer.role) != ("user", "assistant"):
            return dialogue  # out of order in a way that is not mended
        if question.is_empty or answer.is_empty:
            homeless += question.images
            repairs.append("pair with an empty text left out")
        else:
            kept += [Turn("user", homeless + question.parts), answer]
            homeless = []
    if homeless:
        kept.append(Turn("user", homeless))  # no question is left that could show them
    return kept + dialogue[len(dialogue) // 2 * 2 :]


def structured(messages: Sequence[dict[str, Any]], images: Iterator[Any]) -> list[dict[str, Any]]:
    """`messages` with the next of `images` in each image part."""
    return [
        {
            "role": message["role"],
            "content": [
                {**part, "image": next(images)} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in messages
    ]
