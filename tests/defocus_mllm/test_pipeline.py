"""`pipeline("image-text-to-text")` on a saved model: chats with images, and the answers of `generate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import pipeline

GREEDY = {"generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}


@pytest.fixture
def checkpoint(model, processor, tmp_path: Path) -> str:
    for part in (model, processor):
        part.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def chat(*colors: str, question: str = "is it red?") -> list[dict[str, Any]]:
    images = [{"type": "image", "image": Image.new("RGB", (20, 30), color)} for color in colors]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def generated(model, processor, messages: list[dict[str, Any]]) -> list[int]:
    """Prompt and answer as `generate` gives them."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()


CHATS = [chat("red"), chat("red", "blue", question="what color is the shape?"), chat(question="does it?")]


@pytest.mark.parametrize("messages", CHATS, ids=["one image", "two images", "words alone"])
def test_a_chat_is_answered_as_by_generate(messages, model, processor, checkpoint) -> None:
    answer = pipeline("image-text-to-text", model=checkpoint, trust_remote_code=True)
    expected = generated(model, processor, messages)
    (ids,) = answer(text=messages, return_tensors=True, **GREEDY)
    assert ids["generated_token_ids"].tolist() == expected
    (record,) = answer(text=messages, **GREEDY)
    assert record["generated_text"][:-1] == messages
    prompt = len(processor.prompt_ids(messages)) + sum(
        processor.num_image_tokens - 1 for part in messages[0]["content"] if part["type"] == "image"
    )
    said = processor.decode(expected[prompt:], skip_special_tokens=True)
    assert said.strip(), "a model that says nothing shows nothing"
    assert record["generated_text"][-1] == {"role": "assistant", "content": said}


def test_the_image_matters(model, processor, checkpoint) -> None:
    answer = pipeline("image-text-to-text", model=checkpoint, trust_remote_code=True)
    answers = {
        answer(text=chat(color), return_full_text=False, **GREEDY)[0]["generated_text"] for color in ("red", "blue")
    }
    assert len(answers) == 2


def test_a_batch_of_chats_is_answered_as_one_by_one(model, processor, checkpoint) -> None:
    answer = pipeline("image-text-to-text", model=checkpoint, trust_remote_code=True)
    together = answer(text=CHATS[:2], batch_size=2, return_full_text=False, **GREEDY)
    alone = [answer(text=messages, return_full_text=False, **GREEDY) for messages in CHATS[:2]]
    assert [record["generated_text"] for (record,) in together] == [record["generated_text"] for (record,) in alone]


def test_an_answer_is_continued(checkpoint) -> None:
    answer = pipeline("image-text-to-text", model=checkpoint, trust_remote_code=True)
    begun = [*chat("red"), {"role": "assistant", "content": [{"type": "text", "text": "a blue"}]}]
    (record,) = answer(text=begun, **GREEDY)
    (part,) = record["generated_text"][-1]["content"]
    assert part["text"].startswith("a blue")
    assert len(part["text"]) > len("a blue")


WITHOUT_PACKAGE = """
import json
import sys
from PIL import Image
from transformers import pipeline

sys.modules["defocus_mllm"] = None  # importing the package fails
content = [{"type": "image", "image": Image.new("RGB", (20, 30), "red")}, {"type": "text", "text": "is it red?"}]
answer = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
options = {"max_new_tokens": 6, "do_sample": False}
(ids,) = answer(text=[{"role": "user", "content": content}], return_tensors=True, generate_kwargs=options)
print(json.dumps(ids["generated_token_ids"].tolist()))
"""


def test_a_checkpoint_s_own_code_answers_without_complaint(model, processor, checkpoint, tmp_path) -> None:
    finished = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PACKAGE, checkpoint],
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert json.loads(finished.stdout.splitlines()[-1]) == generated(model, processor, CHATS[0])
    assert "is not supported" not in finished.stderr
