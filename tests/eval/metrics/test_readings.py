"""How answers are read: yes/no, letters; and the scores of groups."""

from __future__ import annotations

import pytest

from eval.metrics.multiple_choice import (
    circular_accuracy,
    parse_exact_letter,
    parse_letter_lenient,
    parse_mmbench,
    parse_science_qa,
)
from eval.metrics.yes_no import mme_scores, parse_mme, parse_pope, parse_yes_no_lenient, pope_scores


@pytest.mark.parametrize(
    ("text", "pope", "mme", "lenient"),
    [
        ("No", "no", "no", "no"),
        ("Yes", "yes", "yes", "yes"),
        ("NO", "yes", "no", "no"),
        ("No!", "yes", "no", "no"),
        ("Nope", "yes", "no", "no"),
        ("There isn't", "yes", None, "no"),
        ("", "yes", None, None),
        ("unknown", "yes", None, None),
        ("no\nthere", "yes", "no", "no"),
        ("Yes, there is no doubt.", "no", "yes", "yes"),
        ("No, there is not", "no", "no", "no"),
        ("It is. No", "yes", None, "no"),
        ("nothing", "yes", "no", None),
        ("it is yes", "yes", None, "yes"),
    ],
)
def test_yes_no(text: str, pope: str, mme: str | None, lenient: str | None) -> None:
    assert (parse_pope(text), parse_mme(text), parse_yes_no_lenient(text)) == (pope, mme, lenient)


def test_pope_scores() -> None:
    pairs = [("Yes", "yes"), ("Yes", "no"), ("No", "no"), ("No", "yes"), ("hm", "yes")]
    rows = [{"prediction": prediction, "label": label} for prediction, label in pairs]
    expected = {"f1": 2 / 3, "accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "yes_ratio": 0.6, "unparsed": 0.2}
    assert pope_scores(rows) == pytest.approx(expected)
    assert pope_scores(rows, "lenient")["accuracy"] == pytest.approx(0.4)
    never = pope_scores([{"prediction": "No", "label": "yes"}])
    assert (never["f1"], never["precision"]) == (0, 0)


def test_mme_scores() -> None:
    table = [("OCR", 1, "Yes", "Yes"), ("OCR", 1, "yes", "No"), ("OCR", 2, "YES.", "Yes"), ("OCR", 2, "not", "No")]
    table += [("code_reasoning", 1, "Well", "Yes"), ("code_reasoning", 1, "No", "No")]
    rows = [dict(zip(("category", "image", "prediction", "label"), row, strict=True)) for row in table]
    scores = mme_scores(rows)
    assert scores["perception"] == scores["OCR"] == pytest.approx(75 + 50)
    assert scores["cognition"] == pytest.approx(50)
    assert scores["unparsed"] == pytest.approx(1 / 6)


def test_circular_accuracy_needs_every_rotation() -> None:
    rows = [{"group": group, "correct": correct} for group, correct in [(1, 1), (1, 1), (2, 1), (2, 0), (3, 0)]]
    assert circular_accuracy(rows) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "science", "exact", "mmbench", "lenient"),
    [
        ("B", "B", "B", "B", "B"),
        ("B.", None, None, "B", "B"),
        ("(B)", None, None, "B", "B"),
        ("b", None, None, None, "B"),
        ("B. a dog", "B", None, "B", "B"),
        ("The answer is B.", "B", None, "B", "B"),
        ("The answer is B. The answer is A.", None, None, "B", None),
        ("F. The answer is A.", "A", None, "A", "A"),
        ("F. I do not know", None, None, None, None),
        ("A.\nB", None, None, None, "A"),
        ("the answer is bluish, or so", None, None, "B", None),
        ("B is what I would say here", None, None, None, "B"),
        ("I would say here B", None, None, "B", "B"),
        ("Cannot determine the answer: B", None, None, None, "B"),
        ("Z or a dog", None, None, None, "B"),
        ("Failed to obtain answer via API", None, None, None, None),
        ("Blue", None, None, None, None),
        (" B", None, None, "B", "B"),
        ("a dog", None, None, "B", "B"),
        ("A big dog runs", None, None, "A", None),
        ("a dog, if I am to judge from its tail", None, None, None, "B"),
        ("cat or dog", None, None, "A", "A"),
        ("", None, None, None, None),
    ],
)
def test_letters(text: str, science: str | None, exact: str | None, mmbench: str | None, lenient: str | None) -> None:
    choices = ("cat", "a dog")
    assert parse_science_qa(text) == science
    assert parse_exact_letter(text) == exact
    assert parse_mmbench(text, choices) == mmbench
    assert parse_letter_lenient(text, choices) == lenient


def test_mmbench_knows_no_option_without_text() -> None:
    assert parse_mmbench("C", ("cat", "dog", "", "")) is None
    assert parse_mmbench("C or B", ("cat", "dog", "", "")) == "B"
    assert parse_mmbench("hm", ("cat", "dog", "", "")) is None, '"" is in every text'
