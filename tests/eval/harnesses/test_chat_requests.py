"""From a task's messages to a request: the same answers as our own requests, and every other form of a chat."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from defocus_mllm.images import ImageError
from eval.generator import Request, TransformersGenerator
from eval.harnesses.chat_requests import ChatRequest


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(source: object) -> dict:
    return {"type": "image", "url": source}


def user(*content: dict) -> dict:
    return {"role": "user", "content": list(content)}


def request(*messages: dict) -> ChatRequest:
    return ChatRequest.of("task, document 3", lambda: messages)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in ("red", "blue", "clear")]
    Image.new("RGB", (40, 40), (250, 10, 10)).save(paths[0])
    Image.new("RGB", (64, 30), (10, 10, 250)).save(paths[1])
    Image.new("RGBA", (32, 32), (10, 200, 10, 90)).save(paths[2])
    return paths


@pytest.fixture
def generator(model_dir: Path) -> TransformersGenerator:
    return TransformersGenerator(model_dir, "cpu")


def test_usual_messages_are_our_own_request(generator: TransformersGenerator, pictures: list[Path]) -> None:
    ours = [
        Request("task, document 3", "what color is the shape?", tuple(pictures[:1])),
        Request("task, document 3", "does the image contain it?", tuple(pictures)),
        Request("task, document 3", "is there a red circle?", ()),
    ]
    theirs = [request(user(*map(image, map(str, r.images)), text(r.prompt))) for r in ours]
    in_memory = [request(user(*(image(Image.open(path)) for path in r.images), text(r.prompt))) for r in ours]
    expected = [prediction.text for prediction in generator.generate(ours, 8)]
    assert len(set(expected)) == 3
    for requests in (theirs, in_memory):
        assert [generator.request_length(r) for r in requests] == [generator.request_length(r) for r in ours]
        predictions = generator.generate(requests, 8)
        assert [prediction.text for prediction in predictions] == expected
        generator.forget_images()


def test_equal_pictures_in_memory_are_one(pictures: list[Path]) -> None:
    red, again, blue = (Image.open(path) for path in (pictures[0], pictures[0], pictures[1]))
    first, second, other = request(user(image(red), image(again), image(blue), text("which?"))).images
    assert first == second != other


def test_order_turns_and_system_message_reach_the_template(pictures: list[Path]) -> None:
    red, blue = map(str, pictures[:2])
    messages = [
        {"role": "system", "content": [text("be brief")]},
        user(text("this"), image(red), text("and this"), image(blue)),
        {"role": "assistant", "content": [text("yes")]},
        user(text("sure?")),
    ]
    chat = request(*messages)
    assert chat.images == tuple(pictures[:2])
    assert chat.prompt == "be brief\nthis\nand this\nyes\nsure?"
    conversation = chat.conversation(lambda path: f"loaded {path.name}")
    assert [turn["role"] for turn in conversation] == ["system", "user", "assistant", "user"]
    assert conversation[1]["content"] == [
        text("this"),
        {"type": "image", "image": "loaded red.png"},
        text("and this"),
        {"type": "image", "image": "loaded blue.png"},
    ]


def test_pictures_in_memory_become_what_files_become(pictures: list[Path]) -> None:
    turned = Image.open(pictures[1])
    turned.getexif()[0x0112] = 6  # the camera was held upright
    chat = request(user(image(Image.open(pictures[2])), image(turned), text("what?")))
    first, second, _ = chat.conversation(Image.open)[0]["content"]
    assert (first["image"].mode, first["image"].getpixel((0, 0))) == ("RGB", (169, 236, 169))
    assert second["image"].size == (30, 64)


def test_a_task_that_draws_its_pictures_anew_is_an_error(pictures: list[Path]) -> None:
    order = iter([pictures[0], pictures[1]])
    chat = ChatRequest.of("task, document 3", lambda: [user(image(Image.open(next(order))), text("what?"))])
    with pytest.raises(ValueError, match=r"^task, document 3: its task gives other pictures at every call"):
        chat.conversation(Image.open)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the last message must be the user's, found []"),
        ([{"role": "assistant", "content": [text("yes")]}], "the last message must be the user's, found ['assistant']"),
        ([{"role": "tool", "content": []}], "a message needs a role of system, user, assistant and a list as content"),
        ([{"role": "user", "content": "what?"}], "a list as content, found role 'user' and str"),
        ([user({"type": "video", "url": "a.mp4"})], "the model takes text and images, not 'video'"),
        ([user(image("https://example.org/a.png"))], "found 'https://example.org/a.png'"),
        ([user(image({"bytes": b""}))], "the path of a file, found 'dict'"),
    ],
)
def test_what_cannot_be_understood_is_named(messages: list, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^task, document 3: .*{re.escape(message)}"):
        request(*messages)


def test_a_picture_of_unknown_range_is_refused() -> None:
    with pytest.raises(ImageError, match="image of task, document 3 has 32-bit values"):
        request(user(image(Image.new("F", (4, 4))), text("what?")))
