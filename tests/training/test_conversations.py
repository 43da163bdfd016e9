"""Conversations are checked before training: every bad record is refused or counted, and named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.conversations import format_report, load_conversations

GOOD: dict[str, Any] = {
    "id": 7,
    "image": "coco/0.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "Colour?"},
        {"from": "gpt", "value": "Red."},
    ],
    "model": "",
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images" / "coco").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / "coco" / f"{number}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    return tmp_path / "images"


def write(root: Path, *records: dict[str, Any]) -> Path:
    path = root.parent / "data.json"
    path.write_text(json.dumps(records))
    return path


def changed(**fields: Any) -> dict[str, Any]:
    return copy.deepcopy(GOOD) | fields


def with_value(turn: int, value: Any) -> dict[str, Any]:
    record = copy.deepcopy(GOOD)
    record["conversations"][turn]["value"] = value
    return record


def test_a_record_becomes_structured_messages(root):
    dataset = load_conversations(write(root, GOOD), root)
    conversation = dataset[0]
    assert conversation.record == "data.json[0] (id 7)"
    assert conversation.messages == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(root / "coco/0.png")},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
        {"role": "user", "content": [{"type": "text", "text": "Colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    ]
    assert dataset.report["left_out"] == {}


def test_chat_style_keys_text_only_system_and_several_images(root):
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
        ]
    }
    pair = [{"from": "human", "value": "<image> or\n<image>\n?"}, {"from": "gpt", "value": "Both."}]
    two = {"image": ["coco/0.png", "coco/1.png"], "conversations": pair}
    dataset = load_conversations(write(root, chat, two), root)
    assert [message["role"] for message in dataset[0].messages] == ["system", "user", "assistant"]
    assert dataset[1].messages[0]["content"] == [
        {"type": "image", "image": str(root / "coco/0.png")},
        {"type": "text", "text": " or"},
        {"type": "image", "image": str(root / "coco/1.png")},
        {"type": "text", "text": "?"},
    ]
    assert dataset.report["images_per_conversation"] == {0: 1, 2: 1}


BAD = {
    "image missing": changed(image="coco/9.png"),
    "image outside the image root": changed(image="../secret.png"),
    "image is no path": changed(image=3),
    "no conversation": {"image": "coco/0.png"},
    "turn is no object": changed(conversations=["hello"]),
    "unknown role": changed(conversations=[{"from": "robot", "value": "<image>"}]),
    "text missing": with_value(1, None),
    "empty text": with_value(3, " \n"),
    "<image> count": with_value(0, "What is it?"),
    "<image> outside a human turn": with_value(1, "An <image>."),
    "turns out of order": changed(conversations=GOOD["conversations"][1:]),
}


@pytest.mark.parametrize(("reason", "record"), BAD.items(), ids=BAD)
def test_each_kind_of_bad_record_is_refused_or_counted(root, reason, record):
    path = write(root, GOOD, record)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_conversations(path, root)
    message = str(raised.value)
    assert str(path) in message
    assert "data.json[1]" in message
    assert "\n" not in message

    dataset = load_conversations(path, root, on_bad_sample="skip")
    assert len(dataset) == 1
    assert dataset.report["records"] == 2
    assert {kind: found["count"] for kind, found in dataset.report["left_out"].items()} == {reason: 1}
    assert "data.json[1]" in format_report(dataset.report)


@pytest.mark.parametrize(
    "record",
    [
        with_value(0, "<image><image>\nWhat?"),
        changed(image=None),
        changed(image=["coco/0.png", "coco/1.png"]),
        changed(conversations=GOOD["conversations"][:3]),
        changed(conversations=[GOOD["conversations"][0]] * 2),
        changed(conversations=[]),
        changed(image="/etc/passwd"),
        changed(image=""),
    ],
)
def test_more_bad_records(root, record):
    with pytest.raises(ValueError, match=r"data\.json\[0\]"):
        load_conversations(write(root, record), root)


def test_all_missing_images_are_listed_at_once(root):
    records = [changed(id=number, image=f"gone/{number}.png") for number in range(25)]
    with pytest.raises(FileNotFoundError) as raised:
        load_conversations(write(root, GOOD, *records), root)
    message = str(raised.value)
    assert "25 record(s)" in message
    assert all(f"data.json[{number + 1}] (id {number}): {root}/gone/{number}.png" in message for number in range(20))
    assert "and 5 more" in message
    report = format_report(load_conversations(write(root, GOOD, *records), root, "skip").report)
    assert "left out, image missing: 25" in report
    assert all(f"gone/{number}.png" in report for number in range(20))
    assert "and 5 more" in report


def test_linked_image_folders_are_followed(root, tmp_path):
    (root / "linked").symlink_to(root / "coco")
    assert len(load_conversations(write(root, changed(image="linked/1.png")), root)) == 1


def test_nothing_usable_and_an_unknown_policy(root):
    path = write(root, BAD["empty text"])
    with pytest.raises(ValueError, match="no usable conversation"):
        load_conversations(path, root, on_bad_sample="skip")
    with pytest.raises(ValueError, match="on_bad_sample"):
        load_conversations(path, root, on_bad_sample="ignore")


def test_malformed_json_is_an_error_under_every_policy(root):
    path = write(root)
    path.write_text('[{"id": 1},]')
    for policy in ("raise", "skip"):
        with pytest.raises(ValueError, match=r"data\.json: malformed JSON at line 1"):
            load_conversations(path, root, policy)


def test_image_paths_start_at_the_files_folder_by_default(root):
    path = write(root, changed(image="images/coco/0.png"))
    assert load_conversations(path)[0].messages[0]["content"][0]["image"] == str(root / "coco/0.png")
