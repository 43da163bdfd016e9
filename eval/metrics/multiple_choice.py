"""Letters of multiple-choice answers, and circular accuracy.

Official scripts: `llava/eval/eval_science_qa.py` (ScienceQA) and `scripts/convert_seed_for_submission.py` (SEED-Bench)
of https://github.com/haotian-liu/LLaVA; the offline matching of https://github.com/open-compass/VLMEvalKit (MMBench);
`lmms_eval/tasks/ai2d/utils.py` of https://github.com/EvolvingLMMs-Lab/lmms-eval (AI2D).
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LETTERS = "ABCDEFGHIJ"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def parse_science_qa(text: str) -> str | None:
    """LLaVA's reading: a letter A to E alone, a capital followed by ". ", or one "The answer is X."; else None, wrong.

    "B." and "(B)" are None. Any character may stand for the period of "The answer is X.": its pattern leaves it bare.
    """
    if text in ("A", "B", "C", "D", "E"):
        return text
    if len(text) >= 3 and "A" <= text[0] <= "Z" and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return str(found[0]) if len(found) == 1 else None


def parse_exact_letter(text: str) -> str | None:
    """SEED-Bench's reading in LLaVA: the answer is a capital letter and nothing else, not even white space."""
    return text if len(text) == 1 and text in LETTERS else None


def parse_lmms_letter(text: str) -> str | None:
    """lmms-eval's reading of AI2D: a capital and a period in front, or else one letter and no more but punctuation.

    "B. dog" and "(b)" are B; "The answer is B" and "B dog" are None, wrong.
    """
    front = re.match(r"\s*([A-Z])\.", text)
    letter = (front[1] if front else text).strip().lower().translate(_NO_PUNCTUATION)
    return letter.upper() if len(letter) == 1 and letter in string.ascii_lowercase else None


def parse_mmbench(text: str, choices: Sequence[str]) -> str | None:
    """The offline heuristics of MMBench: one option letter among the words, else one option whose text is in it.

    Punctuation around words does not count; an "A" among more than three words is taken for the article. Where the
    official pipeline would ask ChatGPT or guess, None: unparsed, wrong.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    options = LETTERS[: len(choices)]
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not (letters[0] == "A" and len(words) > 3):
        return letters[0]
    if len(letters) > 1:
        return None
    lower = text.lower()
    contained = [letter for letter, choice in zip(options, choices, strict=True) if choice and choice.lower() in lower]
    return contained[0] if len(contained) == 1 else None


def parse_letter_lenient(text: str, choices: Sequence[str], number: int | None = None) -> str | None:
    """A forgiving reading: a letter in front ("b", "(B)", "B.", "B: dog"), "answer is B", one letter, an option's text.

    `number` is the number of options where their texts are not known. None if nothing, or several options, fit.
    """
    options = LETTERS[: number or len(choices)]
    stripped = text.strip()
    front = re.match(r"[(\[*\s]*([A-Za-z])(?:[)\].:,*]|\s*$)", stripped)
    if front and front[1].upper() in options:
        return front[1].upper()
    said = {letter.upper() for letter in re.findall(r"(?i:answer|option|choice)(?i: is)?:? *[(\[*]*([A-Za-z])\b", text)}
    if len(said) == 1 and said <= set(options):
        return said.pop()
    for letter, choice in zip(options, choices, strict=False):
        if choice.strip() and choice.strip().lower() == stripped.rstrip(".").lower():
            return letter
    return parse_mmbench(text, choices) if choices else _only_letter(text, options)


def _only_letter(text: str, options: str) -> str | None:
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    return letters[0] if len(letters) == 1 and not (letters[0] == "A" and len(words) > 3) else None


def circular_sums(rows: Sequence[Mapping[str, Any]], group: str = "group", key: str = "correct") -> np.ndarray:
    """(rows, 2): (all rotations right, 1) at the first row of each group, zeros at the others."""
    right: dict[Any, bool] = {}
    for row in rows:
        right[row[group]] = right.get(row[group], True) and float(row[key]) == 1.0
    sums = np.zeros((len(rows), 2))
    counted: set[Any] = set()
    for number, row in enumerate(rows):
        if row[group] not in counted:
            counted.add(row[group])
            sums[number] = right[row[group]], 1
    return sums


def circular_accuracy(rows: Sequence[Mapping[str, Any]]) -> float:
    """MMBench's CircularEval: the share of questions right in every rotation; rows are {"group", "correct"}."""
    right, groups = circular_sums(rows).sum(axis=0)
    return float(right / groups)
