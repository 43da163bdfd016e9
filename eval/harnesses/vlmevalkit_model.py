"""Our checkpoints as a model of VLMEvalKit (https://github.com/open-compass/VLMEvalKit).

The kit is imported inside functions: it is no dependency of ours, and importing it takes many packages.
"""

from __future__ import annotations

import contextlib
import importlib
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.benchmarks.official import LETTER_SUFFIX, SHORT_SUFFIX
from eval.generator import Generator
from eval.harnesses.chat_requests import ChatRequest

_YES_NO_INSTRUCTION = "Please answer yes or no."
_LETTER_SUFFIX_CN = "\n请直接回答选项字母。"
_LETTER_FORM = {"ImageMCQDataset", "TextMCQDataset"}
_SHORT_FORM = {"ImageYORNDataset"}


@dataclass
class Tally:
    """What one process has answered: how many samples, and how many answers were cut at the token limit."""

    answered: int = 0
    truncated: int = 0


def model_class() -> Any:
    """The class that the kit calls: `KitAnswers` on the kit's own `vlmeval.vlm.base.BaseModel`."""
    return type("DefocusVLM", (KitAnswers, importlib.import_module("vlmeval.vlm.base").BaseModel), {})


class KitAnswers:
    """Answers the kit's questions as `eval.run` would: same preprocessing, greedy, one at a time.

    Args:
        generator: gives the answers.
        max_new_tokens: of an answer.
        tally: counts them.
        several: whether this process is one of several (see `ending_the_process`).
    """

    INTERLEAVE = True
    allowed_types = ("text", "image")
    dump_image: Any
    """The kit's: (row, name of the data set) -> paths of its images."""
    dump_image_func: Any = None
    """The kit's: a method of its object for the data set."""

    def __init__(self, generator: Generator, max_new_tokens: int, tally: Tally, several: bool = False) -> None:
        super().__init__()
        self._generator = generator
        self._max_new_tokens = max_new_tokens
        self._tally = tally
        self._several = several

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether this is a kind of question for which LLaVA-1.5 has a prompt."""
        return prompt_form(self._dataset) is not None

    def build_prompt(self, line: Mapping[str, Any], dataset: str | None = None) -> list[dict[str, str]]:
        """The images of a row of the kit's table, then LLaVA-1.5's prompt for its question."""
        with ending_the_process(self._several):
            images = self.dump_image(line, dataset)
            prompt = llava_prompt(line, prompt_form(self._dataset), chinese="_CN" in (dataset or ""))
        return [*({"type": "image", "value": image} for image in images), {"type": "text", "value": prompt}]

    @property
    def _dataset(self) -> Any:
        """The kit's object; it tells the model the name alone, which says nothing about a user's own table."""
        return getattr(self.dump_image_func, "__self__", None)

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """Answer a message of texts and images (paths) in any order.

        Raises:
            ValueError: a part that is neither text nor image, or a role other than the user's.
            ImageError: an image cannot be used.
        """
        content = [message_part(part, dataset) for part in message]
        request = ChatRequest.of(dataset or "question", lambda: [{"role": "user", "content": content}])
        (prediction,) = self._generator.generate([request], self._max_new_tokens)
        self._tally.answered += 1
        self._tally.truncated += prediction.finish == "length"
        return prediction.text

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """Answer a question, a string or a list of strings or parts."""
        with ending_the_process(self._several):
            return str(super().generate(message, dataset))  # type: ignore[misc]

    def chat(self, messages: Any, dataset: str | None = None) -> str:
        """Refuse: the kit would take the error of a question with history for an answer, and go on."""
        with ending_the_process(self._several):
            raise ValueError(f"{dataset}: questions in several turns are not supported; leave it out of --data")


@contextlib.contextmanager
def ending_the_process(several: bool) -> Iterator[None]:
    """Within it an error ends the process, if it is one of `several`.

    The kit logs an error and goes on with the next data set, while the other processes wait for this one at the end of
    the present data set, for an hour. `SystemExit` passes the kit, and torchrun ends the others.
    """
    try:
        yield
    except Exception as error:
        if several:
            raise SystemExit(f"error: {error}") from error
        raise


def message_part(part: Mapping[str, str], dataset: str | None) -> dict[str, str]:
    """A part of the message (words, or the path of an image) for `ChatRequest`; ValueError names what else it is."""
    role = part.get("role", "user")
    if role != "user":
        raise ValueError(f"{dataset}: its messages have a part of role {role!r}; only the user's are supported")
    if part["type"] == "text":
        return {"type": "text", "text": part["value"]}
    if part["type"] == "image":
        return {"type": "image", "url": part["value"]}
    raise ValueError(f"{dataset}: its messages have a part of type {part['type']!r}; text and image are supported")


def prompt_form(dataset: Any) -> str | None:
    """LLaVA-1.5's prompt for a data set: "letter" (multiple choice), "short" (yes/no, the user's own questions).

    None, the kit's own prompt, where the kit writes one for this data set in particular, and for open questions, where
    it writes LLaVA-1.5's already or none is meant (descriptions).
    """
    kind = type(dataset)
    author = getattr(getattr(kind, "build_prompt", None), "__qualname__", "").partition(".")[0]
    if author in _LETTER_FORM:
        return "letter"
    if author in _SHORT_FORM or kind.__name__ == "CustomVQADataset":
        return "short"
    return None


def llava_prompt(line: Mapping[str, Any], form: str | None, chinese: bool = False) -> str:
    """LLaVA-1.5's prompt for a row of the kit's tables, whose empty cells are missing or NaN.

    Multiple choice without options gets the short form. `chinese` is for the Chinese MMBench, which LLaVA-1.5 asks for
    the letter in its language.
    """
    cells = {name: str(line[name]) for name in ("hint", "question", *string.ascii_uppercase) if is_filled(line, name)}
    question = cells["question"]
    if form == "letter" and "A" in cells:
        hint = f"{cells['hint']}\n" if "hint" in cells else ""
        options = "".join(f"\n{name}. {cells[name]}" for name in string.ascii_uppercase if name in cells)
        return hint + question + options + (_LETTER_SUFFIX_CN if chinese else LETTER_SUFFIX)
    return question.replace(_YES_NO_INSTRUCTION, "").strip() + SHORT_SUFFIX


def is_filled(line: Mapping[str, Any], name: str) -> bool:
    """Whether the row has this cell: pandas reads an empty one as NaN, which equals nothing."""
    return name in line and line[name] is not None and line[name] == line[name]
