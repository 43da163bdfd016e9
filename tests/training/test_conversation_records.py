"""Records of every known shape become the same messages; known faults are refused, or mended on demand."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from training.conversation_records import BadRecord, ImageReference, check_record

IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def llava(*values: str, image: Any = None) -> dict[str, Any]:
    sides = ("human", "gpt")
    turns = [{"from": sides[number % 2], "value": value} for number, value in enumerate(values)]
    return {"conversations": turns} | ({} if image is None else {"image": image})


def reason_of(record: Any, **options: Any) -> str:
    with pytest.raises(BadRecord) as caught:
        check_record(record, "data.json[3]", **options)
    message = str(caught.value)
    assert message.startswith("data.json[3]")
    assert "\n" not in message
    assert len(message) < 600
    return caught.value.reason


def test_the_shapes_of_the_official_files() -> None:
    after = {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": [
            {"from": "human", "value": "Render a summary of the photo.\n<image>"},
            {"from": "gpt", "value": "select luxury furniture"},
        ],
    }
    checked = check_record(after, "r")
    assert checked.images == [ImageReference("00453/004539375.jpg")]
    assert checked.messages == [
        user(text("Render a summary of the photo."), IMAGE),
        assistant(text("select luxury furniture")),
    ]
    text_only = {"id": "wgByO4Y_0", "model": "", **llava("How?", "So.", "And?", "Thus.")}
    checked = check_record(text_only, "r")
    assert checked.images == []
    assert [message["role"] for message in checked.messages] == ["user", "assistant"] * 2


def test_openai_and_hugging_face_parts() -> None:
    picture = b"\x89PNG..."
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    content = [
        {"type": "text", "text": "Compare <image> and", "image": None},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "image": "a/b.png", "text": None},
        {"type": "image", "path": "c.png"},
        {"type": "image"},
        {"type": "image_url", "image_url": "file://d%20e.png"},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "They differ."}]
    checked = check_record({"messages": messages, "images": ["last.png"]}, "r")
    assert [image.path for image in checked.images] == [None, "a/b.png", "c.png", "last.png", "d e.png"]
    assert checked.images[0].bytes == picture
    # <image> inside a text part is the user's text
    assert checked.messages == [user(text("Compare <image> and"), *[IMAGE] * 5), assistant(text("They differ."))]


def test_embedded_images_fill_the_placeholders_in_order() -> None:
    embedded = [ImageReference("shard.tar", 512, 10), ImageReference("shard.tar", 1536, 20)]
    checked = check_record(llava("<image> or <image>?", "Both.", image="not/looked/at.jpg"), "r", embedded)
    assert checked.images == embedded
    assert reason_of(llava("<image>", "One."), embedded=embedded) == "<image> count"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "not an object"),
        ([], "not an object"),
        ({}, "no conversation"),
        ({"messages": {"role": "user"}}, "no conversation"),
        (llava("<image>", "x", image="http://host/a.png"), "image is a URL"),
        (llava("<image>", "x", image="a\\b.png"), "backslash in a path"),
        (llava("<image>", "x", image="a\0.png"), "image is no path"),
        (llava("<image>", "x", image="a\ud800.png"), "image is no path"),
        (llava("<image>", "x", image=[["a.png"]]), "image is no path"),
        (llava("<image>", "x", image="data:image/png;base64,%%%"), "image URL malformed"),
        (llava("<image>", "x", image="data:image/png,abc"), "image URL malformed"),
        (llava("<image>", "x", image="a.png") | {"images": ["b.png"]}, "image is no path"),
        (llava("What?", "x", image="a.png"), "<image> count"),
        (llava("<image>", "x"), "<image> count"),
        (llava("What?", "An <image>."), "<image> outside a human turn"),
        (llava("half \ud83d", "x"), "text is not Unicode"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [user({"type": "video", "video": "a.mp4"}), assistant(text("x"))]}, "unknown part"),
        ({"messages": [user("bare"), assistant(text("x"))]}, "unknown part"),
        ({"messages": [user({"type": "image_url"}), assistant(text("x"))]}, "image is no path"),
        ({"messages": [user(), assistant(text("x"))]}, "empty text"),
        (llava("", "x"), "empty text"),
        (llava("q", "\n "), "empty text"),
        (
            {"messages": [user(text("a")), assistant(text("b")), user(text("c"))]},
            "turns out of order",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(record: Any, reason: str) -> None:
    assert reason_of(record) == reason


def test_messages_stay_short_whatever_the_record_holds() -> None:
    deep: Any = "x"
    for _ in range(400):
        deep = [deep]
    reason_of({"conversations": [{"from": "x" * 10_000, "value": ""}]})
    reason_of({"conversations": [{"from": "human", "value": deep}]})
    reason_of(llava("<image>", "x", image={"path": "y" * 10_000}))
    reason_of({"conversations": [{"from": "human", "value": "x"}] * 5_000})


@pytest.mark.parametrize(
    ("record", "repair", "left"),
    [
        ({"conversations": [{"from": "gpt", "value": "Hi."}, *llava("q", "a")["conversations"]]},
         "leading answer left out", [user(text("q")), assistant(text("a"))]),
        (llava("q", "a", "unanswered"), "trailing question left out", [user(text("q")), assistant(text("a"))]),
        ({"conversations": [{"from": "human", "value": "one"}, *llava("two", "a")["conversations"]]},
         "turns of one side joined", [user(text("one"), text("two")), assistant(text("a"))]),
        (llava("q", "a", "r", " "), "pair with an empty text left out", [user(text("q")), assistant(text("a"))]),
        (llava("q", "a", image="a.png"), "<image> written before the first question",
         [user(IMAGE, text("q")), assistant(text("a"))]),
        ({"conversations": [{"from": "system", "value": " "}, *llava("q", "a")["conversations"]]},
         "empty system text left out", [user(text("q")), assistant(text("a"))]),
    ],
)  # fmt: skip
def test_known_faults_are_refused_or_mended(record: Any, repair: str, left: Any) -> None:
    reason_of(record)
    checked = check_record(record, "r", repair=True)
    assert checked.messages == left
    assert checked.repairs == [repair]


def test_a_repair_never_loses_an_image() -> None:
    record = llava("<image>\nfirst", " ", "second", "answer", image="a.png")
    checked = check_record(record, "r", repair=True)
    assert checked.messages == [user(IMAGE, text("second")), assistant(text("answer"))]
    assert reason_of(llava("q", "a", "<image>", " ", image="a.png"), repair=True) == "turns out of order"
    assert reason_of(llava("q", "a", "<image>", image="a.png"), repair=True) == "turns out of order"


def test_nothing_else_is_mended() -> None:
    assert check_record(llava("q", "a"), "r", repair=True).repairs == []
    assert reason_of(llava("q", ""), repair=True) == "no answer"
    assert reason_of(llava("<image>", "a"), repair=True) == "<image> count"
    system = {"from": "system", "value": "s"}
    turns = llava("q", "a")["conversations"]
    assert reason_of({"conversations": [*turns, system, *turns]}, repair=True) == "turns out of order"
