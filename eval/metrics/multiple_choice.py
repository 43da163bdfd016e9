"""Letters of multiple-choice answers, and circular accuracy.

Official scripts: `llava/eval/eval_science_qa.py` (ScienceQA) and `scripts/convert_seed_for_submission.py` (SEED-Bench)
of https://github.com/haotian-liu/LLaVA; `vlmeval/utils/matching_util.py` of https://github.com/open-compass/VLMEvalKit
at its commit e8e78f05 (MMBench, `--judge exact_matching`); `lmms_eval/tasks/ai2d/utils.py` of
https://github.com/EvolvingLMMs-Lab/lmms-eval (AI2D).
"""

from __future__ import annotations

import re
import string
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.metrics.rows import check_rows

LETTERS = "ABCDEFGHIJ"
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SCIENCE_QA = tuple("ABCDE")
_API_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def parse_science_qa(text: str) -> str | None:
    """LLaVA's reading: a letter A to E alone, one in front of ". ", or one "The answer is X."; else None, wrong.

    "B." and "(B)" are None. Any character may stand for the period of "The answer is X.": its pattern leaves it bare.
    X may be any capital; one that is no option is wrong.
    """
    if text in _SCIENCE_QA or (text[:1] in _SCIENCE_QA and text[1:3] == ". "):
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
    letter = (front[1] if front else text).strip().lower().translate(NO_PUNCTUATION)
    return letter.upper() if len(letter) == 1 and letter in string.ascii_lowercase else None


def parse_mmbench(text: str, choices: Sequence[str]) -> str | None:
    """VLMEvalKit's offline heuristics: an option's letter among the words, an "answer is B", or one option's text.

    1. Exactly one option's letter is a word of its own, punctuation aside, and first occurs among the last four words.
       That may be an article: "A dog" reads as A.
    2. The first "answer is" is followed by a letter A to D of an option, in any case, be it the first of a word: "the
       answer is blue" reads as B.
    3. Exactly one option's text is in the answer, which is not longer than twice all options together. An option whose
       text is "" does not exist.

    None: unparsed, wrong; there the official pipeline would ask ChatGPT, or guess. So are refusals and the letter Z.
    """
    options = {letter: choice for letter, choice in zip(LETTERS, choices, strict=False) if choice}
    letter = None if _API_FAILED in text else _mmbench_letter(text, options)
    if letter is not None:
        return letter if letter in options else None
    lower = text.lower()
    if len(lower) > 2 * sum(len(choice) for choice in options.values()):
        return None
    return _only(option for option, choice in options.items() if choice.lower() in lower)


def _mmbench_letter(text: str, options: Container[str]) -> str | None:
    """Rules 1 and 2 of `parse_mmbench`; Z for a refusal, None if nothing says an option."""
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    words = _words(text)
    letters = [letter for letter in LETTERS if letter in options and letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    said = _ANSWER_IS.search(text)
    return said[1].upper() if said and said[1].upper() in options else None


def _words(text: str) -> list[str]:
    return re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()


def _only(found: Iterable[str]) -> str | None:
    """The one element of `found`; None if there are none or several."""
    all_found = list(found)
    return all_found[0] if len(all_found) == 1 else None


def parse_letter_lenient(text: str, choices: Sequence[str], number: int | None = None) -> str | None:
    """A forgiving reading: a letter in front ("b", "(B)", "B.", "B: dog"), "answer is B", one letter, an option's text.

    An "A" among more than three words is taken for the article. `number` is the number of options where their texts are
    not known. None if nothing, or several options, fit.
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
    words = _words(text)
    letters = [letter for letter in options if letter in words]
    if letters and letters != ["A"]:
        return _only(letters)
    if letters and len(words) < 4:
        return "A"
    lower = text.lower()
    return _only(letter for letter, choice in zip(options, choices, strict=False) if choice and choice.lower() in lower)


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
    """MMBench's CircularEval, 0 to 1: the share of questions that are right in every rotation of their options.

    Rows are {"group": the question, the same for all its rotations, "correct": 0, 1 or a bool}, one for each rotation.

    Raises:
        ValueError: no rows, or a missing key.
    """
    check_rows(rows, ("group", "correct"))
    right, groups = circular_sums(rows).sum(axis=0)
    return float(right / groups)
