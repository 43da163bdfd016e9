"""Lengths are those of the examples trained on, counted without images, once, and again where anything changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from training import lengths
from training.conversations import Conversation
from training.lengths import UNUSABLE, cache_folder, measure_lengths
from training.supervision import ConversationCollator


def conversation(number: int, *turns: tuple[str, str], images: int = 1) -> Conversation:
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        pictures = [{"type": "image", "image": "nowhere.png"}] * (0 if messages else images)
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Conversation(messages=messages, record=f"data.json[{number}]")


@pytest.fixture
def dataset() -> list[Conversation]:
    turns = [("what color is the shape?", "red"), ("is there a red circle in the image?", "yes")]
    return [
        conversation(0, *turns),
        conversation(1, turns[0], images=0),
        conversation(2, turns[1], images=2),
        conversation(3, *turns * 4),
    ]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The records whose tokens are counted."""
    seen: list[str] = []
    count = ConversationCollator.count_tokens

    def noted(self: ConversationCollator, conversation: Conversation, key: Any = None) -> int:
        seen.append(conversation.record)
        return count(self, conversation, key)

    monkeypatch.setattr(ConversationCollator, "count_tokens", noted)
    return seen


def test_lengths_are_those_of_the_examples(processor, dataset, image, tmp_path: Path) -> None:
    collate = ConversationCollator(processor, max_length=90)
    found = measure_lengths(dataset, collate, 0, tmp_path)
    for one in dataset:
        for message in one.messages:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = image
    assert list(found) == [collate([one])["input_ids"].shape[1] for one in dataset]
    assert max(found) <= 90 < 4 * found[0]  # of the last one whole turns are left out


def test_what_was_counted_is_read_by_the_next_run(processor, dataset, counted: list[str], tmp_path: Path) -> None:
    first = measure_lengths(dataset, ConversationCollator(processor), 0, tmp_path)
    assert len(counted) == len(dataset)
    assert measure_lengths(dataset, ConversationCollator(processor), 0, tmp_path) == first
    assert len(counted) == len(dataset)
    (kept,) = tmp_path.iterdir()
    for damaged in (b"", b"no array", kept.read_bytes()[:-1]):
        kept.write_bytes(damaged)
        counted.clear()
        assert measure_lengths(dataset, ConversationCollator(processor), 0, tmp_path) == first
        assert len(counted) == len(dataset)
    numpy.save(kept, numpy.array([1, 2]))
    assert measure_lengths(dataset, ConversationCollator(processor), 0, tmp_path) == first


@pytest.mark.parametrize("change", ["text", "limit", "turns", "image tokens", "template", "order"])
def test_whatever_a_length_depends_on_makes_it_count_again(
    change: str, processor, dataset, counted: list[str], tmp_path: Path
) -> None:
    measure_lengths(dataset, ConversationCollator(processor), 0, tmp_path)
    counted.clear()
    limits: dict[str, int] = {}
    if change == "text":
        dataset[1] = conversation(1, ("does the image contain it?", "no"), images=0)
    elif change == "order":
        dataset.reverse()
    elif change == "limit":
        limits = {"max_length": 60}
    elif change == "turns":
        limits = {"max_turns": 1}
    elif change == "image tokens":
        processor.num_image_tokens += 1
    else:
        processor.chat_template = processor.chat_template.replace("system", "System")
    measure_lengths(dataset, ConversationCollator(processor, **limits), 0, tmp_path)
    assert len(counted) == len(dataset)


def test_several_processes_count_the_same(processor, dataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lengths, "_AT_ONCE", 3)
    alone = measure_lengths(dataset, ConversationCollator(processor), 0, tmp_path / "one")
    assert measure_lengths(dataset, ConversationCollator(processor), 2, tmp_path / "two") == alone


def test_a_folder_that_cannot_be_written_is_told_and_costs_nothing_else(processor, dataset, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    found = measure_lengths(dataset, ConversationCollator(processor), 0, tmp_path / "file" / "cache")
    assert len(found) == len(dataset)
    assert "are not kept for the next run" in capsys.readouterr().out


def test_what_does_not_fit_has_no_length(processor, dataset, tmp_path: Path) -> None:
    found = measure_lengths(dataset, ConversationCollator(processor, max_length=40), 0, tmp_path)
    assert found[2] == UNUSABLE  # two images and a question
    assert all(found[index] for index in (0, 1, 3))


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "defocus_mllm" / "lengths"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "defocus_mllm" / "lengths"
