"""Answers to lmms-eval's requests: order, batches, settings, failures. Nothing here needs lmms-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval.batches import BatchPolicy
from eval.generator import Request, TransformersGenerator
from eval.harnesses.lmms_answers import answer_all
from eval.samples import Prediction
from tests.eval.fake_generator import FakeGenerator

SETTINGS = {"max_new_tokens": 16, "until": []}


class Echo(FakeGenerator):
    """Answers with the prompt, and notes the limits of its batches."""

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        self.limits = [*getattr(self, "limits", []), max_new_tokens]
        return super().generate(requests, max_new_tokens)

    def answer(self, request: Request) -> Prediction:
        return Prediction(request.id, request.prompt, n_in=7, n_out=2)


def to_messages(document: dict) -> list[dict]:
    images = [{"type": "image", "url": path} for path in document["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": document["prompt"]}]}]


def instance(doc_id: int, settings: dict | None = None) -> SimpleNamespace:
    arguments = ("context", to_messages, SETTINGS if settings is None else settings, doc_id, "shapes", "test")
    return SimpleNamespace(args=arguments, task_name="shapes")


def documents(prompts: Sequence[str], images: Sequence[str] = ()) -> dict:
    return {"shapes": {"test": [{"prompt": prompt, "images": list(images)} for prompt in prompts]}}


def test_order_is_restored_after_batches_by_length() -> None:
    prompts = [" ".join(["word"] * (1 + 7 * number % 5)) + f" {number}" for number in range(9)]
    generator = Echo()
    order = [4, 0, 8, 8, 2, 1, 3, 5, 6, 7, 8]  # repeated, as padding of other processes is
    answers = answer_all([instance(n) for n in order], documents(prompts), generator, BatchPolicy(3), (), False)
    assert [prediction.text for prediction in answers] == [prompts[number] for number in order]
    assert [len(batch) for batch in generator.batches] == [3, 3, 3, 2]
    lengths = [len(request.prompt.split()) for batch in generator.batches for request in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths != [len(prompts[number].split()) for number in order]


def test_settings_hold_for_their_own_requests() -> None:
    prompts = ["red. blue", "green. gray", "teal. black"]
    instances = [
        instance(0),
        instance(1, {"max_new_tokens": 4, "until": ["."]}),
        instance(2, {"max_new_tokens": 16, "until": ["bl"]}),
    ]
    generator = Echo()
    answers = answer_all(instances, documents(prompts), generator, BatchPolicy(), (), False)
    assert [prediction.text for prediction in answers] == ["red. blue", "green", "teal."]
    assert generator.limits == [16, 4]
    unchanged = ({"max_new_tokens": 16, "until": []}, {"max_new_tokens": 4, "until": ["."]})
    assert (SETTINGS, instances[1].args[2]) == unchanged, "lmms-eval makes the keys of its cache of them afterwards"


def test_a_setting_that_is_not_supported_ends_the_run_before_the_first_answer() -> None:
    generator = Echo()
    with pytest.raises(ValueError, match=r"^shapes: generation setting temperature=0.7 is not supported"):
        answer_all(
            [instance(0), instance(1, {"temperature": 0.7})], documents(["a", "b"]), generator, BatchPolicy(), (), False
        )
    assert generator.batches == []
    data = documents(["a"])
    (answer,) = answer_all([instance(0, {"temperature": 0.7})], data, generator, BatchPolicy(), ["temperature"], False)
    assert answer.text == "a"


def test_a_broken_picture_is_named_and_not_left_out(model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    data = documents(["what color is the shape?", "is there a red circle?"])
    data["shapes"]["test"][1]["images"] = [str(broken)]
    generator = TransformersGenerator(model_dir, "cpu")
    with pytest.raises(ValueError, match=r"^1 of 2 requests could not be answered: shapes, test, document 1 .*broken"):
        answer_all([instance(0), instance(1)], data, generator, BatchPolicy(), (), False)


def test_answers_of_a_model_are_those_of_our_requests(model_dir: Path, data_root: Path) -> None:
    folder = data_root / "easy_vqa" / "test" / "images"
    paths = [str(folder / f"{number}.png") for number in range(6)]
    prompts = ["what color is the shape?", "is there a red circle in the image?", "does it?"] * 2
    data = {"shapes": {"test": [{"prompt": p, "images": [i]} for p, i in zip(prompts, paths, strict=True)]}}
    generator = TransformersGenerator(model_dir, "cpu")
    ours = [Request(i, p, (Path(i),)) for p, i in zip(prompts, paths, strict=True)]
    expected = [(p.text, p.n_in, p.n_out) for p in generator.generate(ours, 16)]
    for policy in (BatchPolicy(1), BatchPolicy(4), BatchPolicy(64)):
        answers = answer_all([instance(n) for n in range(6)], data, generator, policy, (), False)
        assert [(p.text, p.n_in, p.n_out) for p in answers] == expected
