"""The model that lmms-eval finds, with a fake of lmms-eval's interface."""

from __future__ import annotations

import ast
import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval.batches import DEFAULT_SAMPLES, DEFAULT_TOKENS, BatchPolicy
from eval.harnesses.lmms_plugin import MODEL_CLASS, MODEL_NAME, manifest
from tests.eval.harnesses import fake_lmms_eval

ROOT = Path(__file__).parents[3]


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_lmms_eval.Logger]:
    yield from fake_lmms_eval.installed(monkeypatch)


@pytest.fixture
def model_class(logger: fake_lmms_eval.Logger) -> Any:
    module, _, name = MODEL_CLASS.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_entry_point_offers_the_chat_model(logger: fake_lmms_eval.Logger, model_class: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = project["entry-points"]["lmms_eval.models"][MODEL_NAME].split(":")
    assert getattr(importlib.import_module(module), name) is manifest
    assert manifest() == SimpleNamespace(model_id="defocus_mllm", chat_class_path=MODEL_CLASS)
    assert issubclass(model_class, fake_lmms_eval.ChatModel)
    assert model_class.is_simple is False


def test_our_package_needs_no_lmms_eval() -> None:
    importers = set()
    for path in (ROOT / "eval").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(str(module).split(".")[0] == "lmms_eval" for module in modules):
                importers.add(path.stem)
    assert importers == {"lmms_model"}


def test_answers_come_with_their_tokens(
    model_class: Any, logger: fake_lmms_eval.Logger, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_class(pretrained=str(model_dir), device="cpu", batch_size="auto")
    rows = [{"prompt": "what color is the shape?"}, {"prompt": "does the image contain it?"}]
    model.task_dict["shapes"] = {"test": rows}

    def to_messages(row: dict) -> list[dict]:
        return [{"role": "user", "content": [{"type": "text", "text": row["prompt"]}]}]

    def instance(doc_id: int, settings: dict) -> SimpleNamespace:
        return SimpleNamespace(args=("", to_messages, settings, doc_id, "shapes", "test"), task_name="shapes")

    answers = model.generate_until([instance(number, {"max_new_tokens": 6}) for number in (1, 0, 1)])
    assert answers[0] == answers[2] != answers[1]
    assert all(isinstance(answer, fake_lmms_eval.GenerationResult) for answer in answers)
    assert all(answer.token_counts.input_tokens > 5 for answer in answers)
    assert all(1 <= answer.token_counts.output_tokens <= 6 for answer in answers)
    assert logger.warnings == []
    monkeypatch.setattr(sys.modules[model_class.__module__], "answer_all", lambda *_, **__: [])
    model.generate_until([instance(0, {"until": ["e"]})])
    assert logger.warnings == ["shapes: no max_new_tokens is set; answers end at 1024 tokens"]


def test_batch_size_is_a_number_or_auto(model_class: Any, model_dir: Path) -> None:
    def policy(**arguments: Any) -> BatchPolicy:
        return model_class(str(model_dir), device="cpu", **arguments)._policy

    assert policy() == BatchPolicy(1, DEFAULT_TOKENS)
    assert policy(batch_size="12", batch_tokens=500) == BatchPolicy(12, 500)
    assert policy(batch_size="auto") == BatchPolicy(DEFAULT_SAMPLES, DEFAULT_TOKENS)
    assert policy(batch_size="auto", max_batch_size=3) == BatchPolicy(3, DEFAULT_TOKENS)
    for wrong in ("auto:4", "0", "-1", "many"):
        with pytest.raises(ValueError, match=f"^--batch_size must be a positive number or auto, found '{wrong}'$"):
            policy(batch_size=wrong)


def test_wrong_arguments_are_named(model_class: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^--model_args: unknown max_pixels, prompt$"):
        model_class(str(model_dir), device="cpu", prompt="", max_pixels=4)
    with pytest.raises(FileNotFoundError, match="nowhere holds no saved model"):
        model_class("nowhere", device="cpu")
    with pytest.raises(ValueError, match=r"^--model_args world_size=2: the launcher started 1; .*torchrun"):
        model_class(str(model_dir), device="cpu", world_size=2)


def test_a_process_knows_its_place(model_class: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    made: list[tuple] = []
    module = sys.modules[model_class.__module__]
    monkeypatch.setattr(module, "generator_of_process", lambda *arguments: made.append(arguments))
    model = model_class(str(model_dir), dtype="bfloat16", world_size=4)
    assert (model.rank, model.world_size) == (3, 4)
    assert made == [(str(model_dir), None, "bfloat16", 2, 1)]


def test_ignored_settings_are_reported(
    model_class: Any, logger: fake_lmms_eval.Logger, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_class(str(model_dir), device="cpu", ignore="image_aspect_ratio+skip_special_tokens")
    handed_on: list[tuple] = []
    monkeypatch.setattr(
        sys.modules[model_class.__module__], "answer_all", lambda *arguments, **_: handed_on.append(arguments) or []
    )
    model.task_dict = {}
    model.generate_until([])
    assert handed_on[0][-1] == ["image_aspect_ratio", "skip_special_tokens"]
    assert logger.warnings == ["generation settings not heeded, as asked for: image_aspect_ratio, skip_special_tokens"]


@pytest.mark.parametrize(
    ("method", "message"),
    [("loglikelihood", "eval.run --likelihood"), ("generate_until_multi_round", "defocus-mllm chat")],
)
def test_what_is_not_there_says_why_and_what_to_use(
    model_class: Any, model_dir: Path, method: str, message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        getattr(model_class(str(model_dir), device="cpu"), method)([])
