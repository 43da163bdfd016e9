"""Conversations about images in LLaVA's format (or with `messages`), checked before training starts.

A record: `{"id": 7, "image": "coco/000.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "A bus."}]}`. `image` may be absent (text only) or a list; roles may also be called user,
assistant, system, their texts `content`, and the list `messages`. Unknown keys are ignored.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.records import read_records, record_name

PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_NAMED_IN_MESSAGE = 20

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One training sample."""

    record: str
    """Where it comes from, for messages: `conversations.json[12] (id 12)`."""
    messages: list[Message]
    """Hugging Face structured messages; image parts hold the path: `{"type": "image", "image": "/data/coco/0.jpg"}`."""


@dataclass(frozen=True)
class _CheckedRecord:
    name: str
    turns: list[tuple[str, str]]
    images: list[str]


class ConversationDataset(Sequence[Conversation]):
    """The usable conversations of one file; made by `load_conversations`."""

    def __init__(self, records: list[_CheckedRecord], report: dict[str, Any]) -> None:
        self._records = records
        self.report = report
        """What was found and what was left out; see `format_report`."""

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]  # slices are of no use here
        record = self._records[index]
        images = iter(record.images)
        messages = [{"role": role, "content": _parts(text, images)} for role, text in record.turns]
        return Conversation(record.name, messages)


class BadRecord(ValueError):
    """A record that cannot be trained on; the message names it and says how to mend it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """The kind of problem in a few words, for counting."""


def load_conversations(
    path: str | Path, image_root: str | Path | None = None, on_bad_sample: str = "raise"
) -> ConversationDataset:
    """Read and check a JSON list or JSON Lines file of conversations.

    Image paths are taken relative to `image_root` (default: the file's folder) and must stay inside it. With
    `on_bad_sample="raise"` a bad record is a ValueError naming file and record, all missing images being listed in one
    FileNotFoundError; with "skip" bad records are left out before training starts, and counted and named in the
    dataset's `report`. Malformed JSON and a file without one usable record are errors either way.
    """
    if on_bad_sample not in ("raise", "skip"):
        raise ValueError(f'on_bad_sample must be "raise" or "skip", not {on_bad_sample!r}')
    path = Path(path)
    root = os.path.abspath(image_root if image_root is not None else path.parent)
    checked, problems = _check_records(path, root)
    missing = {record.name: images for record in checked if (images := _missing_images(record))}
    if on_bad_sample == "raise":
        _raise_first(path, problems, missing)
    usable = [record for record in checked if record.name not in missing]
    report = _report(path, usable, problems, missing)
    if not usable:
        raise ValueError(f"{path} holds no usable conversation. {format_report(report)}")
    return ConversationDataset(usable, report)


def format_report(report: dict[str, Any]) -> str:
    """The report of a dataset in a few lines for the log; every record left out is named."""
    counts = ", ".join(f"{count} with {number} image(s)" for number, count in report["images_per_conversation"].items())
    lines = [
        f"{report['file']}: {report['records']} records, {report['used']} used ({counts or 'none'}),"
        f" {report['turns']} question/answer pairs, {report['distinct_images']} distinct images"
    ]
    for reason, messages in report["left_out"].items():
        lines.append(f"left out, {reason}: {len(messages)}")
        lines += [f"  {message}" for message in messages]
    return "\n".join(lines)


def _check_records(path: Path, root: str) -> tuple[list[_CheckedRecord], list[BadRecord]]:
    checked, problems = [], []
    for index, record in enumerate(read_records(path)):
        name = record_name(path, index, record)
        try:
            images = _image_paths(record, root, name)
            turns = _turns(record, name)
            _check_placeholders(turns, len(images), name)
            checked.append(_CheckedRecord(name, turns, images))
        except BadRecord as problem:
            problems.append(problem)
    return checked, problems


def _image_paths(record: dict[str, Any], root: str, name: str) -> list[str]:
    value = record.get("image")
    names = [] if value is None else value if isinstance(value, list) else [value]
    paths = []
    for image in names:
        if not isinstance(image, str) or not image:
            raise BadRecord("image is no path", f"{name}: image must be a path or a list of paths, not {image!r}")
        # Compared as written: a folder linked to another disk is the user's choice, ".." in a data file is not.
        path = os.path.normpath(os.path.join(root, image))
        if os.path.commonpath([root, path]) != root:
            raise BadRecord(
                "image outside the image root",
                f"{name}: image {image!r} lies outside the image root {root}; move it there",
            )
        paths.append(path)
    return paths


def _turns(record: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """(role, text) of each turn: an optional system turn, then user and assistant in alternation."""
    key = "conversations" if "conversations" in record else "messages"
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRecord("no conversation", f'{name}: needs a non-empty list "conversations"')
    result = [_turn(turn, f"{name}, {key}[{index}]") for index, turn in enumerate(turns)]
    roles = [role for role, _ in result]
    dialogue = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (max(len(dialogue), 2) // 2)
    if dialogue != expected:
        raise BadRecord(
            "turns out of order",
            f"{name}: the roles are {', '.join(roles)}; needed: human and gpt in turn, human first, gpt last",
        )
    return result


def _turn(turn: Any, name: str) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise BadRecord("turn is no object", f'{name}: must be an object with "from" and "value", not {turn!r}')
    role = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRecord("unknown role", f'{name}: "from" must be one of {", ".join(_ROLES)}, not {role!r}')
    if not isinstance(text, str):
        raise BadRecord("text missing", f'{name}: "value" must be a string, not {text!r}')
    if not text.strip():
        raise BadRecord("empty text", f'{name}: the text of "{role}" is empty; fill it in or remove the pair')
    return _ROLES[role], text


def _check_placeholders(turns: list[tuple[str, str]], num_images: int, name: str) -> None:
    found = 0
    for role, text in turns:
        count = text.count(PLACEHOLDER)
        if count and role != "user":
            raise BadRecord(
                "<image> outside a human turn",
                f"{name}: {PLACEHOLDER} stands in a {role} turn; only human turns show images",
            )
        found += count
    if found != num_images:
        raise BadRecord(
            "<image> count",
            f"{name}: {found} {PLACEHOLDER} in the text but {num_images} image(s); write one for each image",
        )


def _parts(text: str, images: Iterator[str]) -> list[dict[str, str]]:
    """Structured content, each image where its placeholder stands.

    The template puts a line break between parts, so the one that is written beside a placeholder is taken away.
    """
    parts: list[dict[str, str]] = []
    pieces = text.split(PLACEHOLDER)
    for index, piece in enumerate(pieces):
        if index > 0:
            parts.append({"type": "image", "image": next(images)})
            piece = piece.removeprefix("\n")
        if index < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _missing_images(record: _CheckedRecord) -> list[str]:
    return [image for image in record.images if not os.path.isfile(image)]


def _raise_first(path: Path, problems: list[BadRecord], missing: dict[str, list[str]]) -> None:
    remedy = 'or leave such records out with on_bad_sample: "skip"'
    if problems:
        others = f"; {len(problems) - 1} more bad record(s)" if len(problems) > 1 else ""
        raise ValueError(f"{path}: {problems[0]}{others}; mend the data {remedy}")
    if missing:
        listed = [f"{name}: {image}" for name, images in missing.items() for image in images]
        shown = "; ".join(listed[:_NAMED_IN_MESSAGE])
        others = f"; and {len(listed) - _NAMED_IN_MESSAGE} more" if len(listed) > _NAMED_IN_MESSAGE else ""
        raise FileNotFoundError(
            f"{path}: images of {len(missing)} record(s) do not exist: {shown}{others}; check image_root {remedy}"
        )


def _report(
    path: Path, usable: list[_CheckedRecord], problems: list[BadRecord], missing: dict[str, list[str]]
) -> dict[str, Any]:
    left_out: dict[str, list[str]] = {}
    for problem in problems:
        left_out.setdefault(problem.reason, []).append(str(problem))
    for name, images in missing.items():
        left_out.setdefault("image missing", []).append(f"{name}: {', '.join(images)}")
    return {
        "file": str(path),
        "records": len(usable) + len(problems) + len(missing),
        "used": len(usable),
        "turns": sum(role == "assistant" for record in usable for role, _ in record.turns),
        "images_per_conversation": dict(sorted(Counter(len(record.images) for record in usable).items())),
        "distinct_images": len({image for record in usable for image in record.images}),
        "left_out": left_out,
    }
