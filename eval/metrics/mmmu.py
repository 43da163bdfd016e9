"""MMMU's readings of an answer: the letter of an option, or the words and numbers of a free answer.

Official script: `mmmu/utils/eval_utils.py` of https://github.com/MMMU-Benchmark/MMMU. Where it cannot read a letter, it
draws one at random (so its result depends on the order of the questions); here such an answer is unread.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.metrics.multiple_choice import LETTERS

_EDGES = ",.!?;:'"
_MORE_WORDS_THAN = 5
"""Texts of options are looked for in answers longer than this only."""
_BEFORE_THE_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
"""Numbers with thousands' commas, in scientific notation, and others."""


def parse_mmmu_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter: one in parentheses, else one between blanks, else (in answers of over five words) an option's text.

    Of several the one that stands last. Signs around the answer go first, each kind once, in a fixed order: "A.," is
    read and "A,." is not. An "A" that is an article reads as A. None where the official script draws a letter.
    """
    for sign in _EDGES:
        text = text.strip(sign)
    text = f" {text} "
    options = dict(zip(LETTERS, choices, strict=False))
    for form in ("({})", " {} "):
        found = {letter: text.rfind(form.format(letter)) for letter in options}
        if max(found.values(), default=-1) >= 0:
            return max(found, key=found.__getitem__)
    if len(text.split()) > _MORE_WORDS_THAN:
        lower = text.lower()
        found = {letter: lower.rfind(option.lower()) for letter, option in options.items()}
        if max(found.values(), default=-1) >= 0:
            return max(found, key=found.__getitem__)
    return None


def parse_mmmu_open(text: str) -> set[str | float]:
    """What a free answer may mean: the ends of its lines behind "is ", "so ", ... (all of it where there are none), and
    the numbers in those, rounded to two decimals.

    An equals sign counts in the last line only. A single letter stands with a blank before it and with one behind it.
    """
    whole = text.strip().strip(".").lower()
    lines = whole.split("\n")
    ends = [_end_of(line, is_last=at == len(lines) - 1) for at, line in enumerate(lines)]
    parts = [end for end in ends if end and end not in set(":,.!?;'")] or [whole]
    numbers = [number for part in parts for pattern in _NUMBERS for number in re.findall(pattern, part)]
    return {value for part in (*parts, *numbers) for value in _normalize(part)}


def _end_of(line: str, is_last: bool) -> str:
    """The shortest end behind a word that announces the answer; an empty one gives way to the next."""
    shortest = ""
    for word in (*_BEFORE_THE_ANSWER, "=") if is_last else _BEFORE_THE_ANSWER:
        if word in line:
            end = line.split(word)[-1].strip()
            if not shortest or len(end) < len(shortest):
                shortest = end
    return shortest


def _normalize(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def mmmu_open_is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the `answers` stands in what was said, or equals one of its numbers to two decimals."""
    wanted = [value for answer in answers for value in _normalize(answer)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(
        any(answer in value for answer in texts) if isinstance(value, str) else value in wanted
        for value in parse_mmmu_open(text)
    )
