"""How answers are read: yes/no, letters; and the scores of groups."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.metrics.multiple_choice import (
    circular_accuracy,
    parse_exact_letter,
    parse_letter_lenient,
    parse_lmms_letter,
    parse_mmbench,
    parse_science_qa,
)
from eval.metrics.text import nlvr_scores
from eval.metrics.yes_no import (
    COGNITION,
    PERCEPTION,
    mme_scores,
    parse_mme,
    parse_pope,
    parse_yes_no_lenient,
    pope_scores,
)


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


def test_an_unread_answer_is_a_yes_that_was_not_said() -> None:
    rows = [{"prediction": text, "label": "yes"} for text in ("Yes", "hm")] + [{"prediction": "hm", "label": "no"}]
    scores = pope_scores(rows, "lenient")
    assert (scores["recall"], scores["precision"], scores["accuracy"]) == (0.5, 1, pytest.approx(1 / 3))
    assert scores["f1"] == pytest.approx(2 / 3)


def mme_row(category: str, image: object, prediction: str, label: str) -> dict[str, object]:
    return {"category": category, "image": image, "prediction": prediction, "label": label}


def test_mme_scores() -> None:
    table = [("OCR", 1, "Yes", "Yes"), ("OCR", 1, "yes", "No"), ("OCR", 2, "YES.", "Yes"), ("OCR", 2, "not", "No")]
    table += [("code_reasoning", 1, "Well", "Yes"), ("code_reasoning", 1, "No", "No")]
    rows = [mme_row(*row) for row in table]
    scores = mme_scores(rows)
    assert scores["perception"] == scores["OCR"] == pytest.approx(75 + 50)
    assert scores["cognition"] == pytest.approx(50)
    assert scores["unparsed"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *((text, "B") for text in ("B", "b", " B\n", "(B)", "b.", "B.", "B. dog", " B.dog", "B.) A", "*B*")),
        *((text, None) for text in ("The answer is B", "B dog", "b. dog", "B )", "", "é", "2")),
    ],
)
def test_lmms_letter(text: str, letter: str | None) -> None:
    assert parse_lmms_letter(text) == letter


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
        ("Failed to obtain answer via API: B", None, None, None, "B"),
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


TWO = [mme_row("OCR", 1, "Yes", "Yes"), mme_row("OCR", 1, "No", "No")]


@pytest.mark.parametrize(
    ("score", "rows", "message"),
    [
        (pope_scores, [], "rows: expected at least one"),
        (
            pope_scores,
            [{"answer": "Yes", "label": "yes"}],
            r"row 1: .* missing \['prediction'\], found \['answer', 'label'\]",
        ),
        (pope_scores, [{"prediction": "Yes", "label": "maybe"}], "'label' must be yes or no, found 'maybe'"),
        (mme_scores, TWO[:1], "image 1 of OCR has 1 questions, expected two"),
        (mme_scores, [*TWO, TWO[0]], "has 3 questions"),
        (mme_scores, [mme_row("smell", 1, "Yes", "Yes")] * 2, r"'category' must be one of .* found \['smell'\]"),
        (circular_accuracy, [{"group": 1}], "missing"),
        (nlvr_scores, [{"identifier": "1-0", "label": "true"}], r"missing \['prediction'\]"),
        (nlvr_scores, [], "at least one"),
    ],
)
def test_malformed_rows_are_named(score: Callable, rows: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(rows)


@pytest.mark.parametrize("score", [pope_scores, mme_scores])
def test_an_unknown_mode_is_refused(score: Callable) -> None:
    with pytest.raises(ValueError, match="mode must be one of official, lenient, found 'best'"):
        score(TWO, "best")


@given(st.lists(st.tuples(st.sampled_from(["Yes", "No", "hm", "not."]), st.sampled_from(["yes", "no"])), min_size=1))
def test_pope_is_what_counting_gives(pairs: list[tuple[str, str]]) -> None:
    rows = [{"prediction": text, "label": label} for text, label in pairs]
    said = [(text in ("Yes", "hm"), label == "yes") for text, label in pairs]
    hits = said.count((True, True))
    scores = pope_scores(rows)
    assert scores == pope_scores(rows[::-1])
    assert all(0 <= score <= 1 for score in scores.values())
    assert scores["accuracy"] == pytest.approx(np.mean([yes == truth for yes, truth in said]))
    assert scores["yes_ratio"] == pytest.approx(np.mean([yes for yes, _ in said]))
    wrong = said.count((True, False)) + said.count((False, True))
    assert scores["f1"] == pytest.approx(2 * hits / (2 * hits + wrong) if hits else 0)


@given(
    st.lists(
        st.tuples(st.sampled_from(PERCEPTION + COGNITION), st.lists(st.sampled_from("YNx"), min_size=2, max_size=2)),
        min_size=1,
        max_size=20,
    ),
    st.randoms(),
)
def test_mme_is_what_counting_gives(images: list[tuple[str, list[str]]], random: Random) -> None:
    text = {"Y": "Yes", "N": "No", "x": "It is"}
    rows = [mme_row(name, at, text[said], "yes") for at, (name, both) in enumerate(images) for said in both]
    random.shuffle(rows)
    scores, total = mme_scores(rows), 0.0
    for category in {name for name, _ in images}:
        of_category = [both for name, both in images if name == category]
        accuracy = np.mean([said == "Y" for both in of_category for said in both])
        points = 100 * (accuracy + np.mean([both == ["Y", "Y"] for both in of_category]))
        assert scores[category] == pytest.approx(points)
        total += points
    assert scores["perception"] + scores["cognition"] == pytest.approx(total)


@given(st.text(), st.sampled_from(["a", "b.", "(A)", "A dog", "answer is b", "Z", "no."]))
def test_readings_are_of_the_kind_they_say(noise: str, seed: str) -> None:
    for text in (noise, seed + noise, noise + seed):
        assert parse_pope(text) in ("yes", "no")
        assert parse_mme(text) in ("yes", "no", None)
        assert parse_mmbench(text, ("cat", "dog")) in ("A", "B", None)
        assert parse_letter_lenient(text, ("cat", "dog")) in ("A", "B", None)
        assert parse_exact_letter(text) in (text, None)
