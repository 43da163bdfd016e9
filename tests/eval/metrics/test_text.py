"""ANLS, relaxed accuracy, NLVR and CIDEr against values worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.metrics.captions import cider, cider_per_image
from eval.metrics.text import (
    anls,
    anls_lenient,
    edit_distance,
    nlvr_scores,
    relaxed_accuracy,
    relaxed_accuracy_lenient,
)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Hello", ["hello"], 1),
        ("abcd", ["abxy"], 0.5),
        ("abc", ["abxy"], 0.5),
        ("abc", ["axyz"], 0),
        ("a  b", ["a b"], 1),
        ("ab   ", ["cb"], 0.8),  # lengths are those of the raw texts
        ("ß", ["xß"], 2 / 3),  # ... in upper case: "XSS" has three letters
        ("", [""], 1),
        ("", ["x"], 0),
        ("dog", ["cat", "dogs"], 0.75),
        ("ABCDEFGX", ["abcdefgß"], 8 / 9),  # "ß" is two letters in upper case
        ("oﬃce", ["office"], 0.5),  # distance 3 of 6
    ],
)
def test_anls(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ('"12 May".', "12 May", 1),
        ("1995\nbecause", "1995", 1),
        (" 1995 ", "1995", 1),
        (".", ".", 1),
        ("199", "1995", 0.75),
    ],
)
def test_anls_lenient(prediction: str, answer: str, score: float) -> None:
    assert anls_lenient(prediction, [answer]) == pytest.approx(score)


@given(st.text(max_size=8), st.text(max_size=8))
def test_anls_lenient_is_never_less(prediction: str, answer: str) -> None:
    assert anls_lenient(prediction, [answer]) >= anls(prediction, [answer])


def test_anls_threshold_itself_is_kept() -> None:
    assert anls("ab", ["ax"], threshold=0.5) == 0.5
    assert anls("ab", ["ax"], threshold=0.51) == 0
    for answers in ([], "a", [1]):
        with pytest.raises(ValueError, match="answers"):
            anls("a", answers)


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@pytest.mark.parametrize(
    ("prediction", "target", "official", "lenient"),
    [
        ("105", "100", 1, 1),
        ("105.1", "100", 0, 0),
        ("2014", "2110", 1, 1),
        ("0.0", "0", 0, 0),
        ("0", "0", 1, 1),
        ("5%", "5", 0, 1),
        ("5%", "0.05", 1, 1),
        ("Yes", "yes", 1, 1),
        ("Yes.", "yes", 0, 1),
        ("1,000", "1000", 0, 1),
        ("$5", "5", 0, 1),
        ("-100", "100", 0, 0),
    ],
)
def test_relaxed_accuracy(prediction: str, target: str, official: float, lenient: float) -> None:
    assert relaxed_accuracy(prediction, target) == official
    assert relaxed_accuracy_lenient(prediction, target) == lenient


def test_nlvr_groups_by_sentence() -> None:
    rows = [
        {"identifier": identifier, "label": "true", "prediction": prediction}
        for identifier, prediction in [
            ("1-0", "True"),
            ("1-1", "TRUE"),
            ("2-0", "true"),
            ("2-1", "false"),
            ("3-0", "?"),
        ]
    ]
    assert nlvr_scores(rows) == {"precision": pytest.approx(3 / 5), "consistency": pytest.approx(1 / 3)}


def test_cider_of_a_hand_worked_corpus() -> None:
    # Two images, every n-gram in one reference set only: idf = ln 2, which cancels. Of "red cat", "red" and no bigram
    # ("red dog") match: (1/sqrt(2) * 1/sqrt(2) + 0) / 4 of ten.
    references = [["red dog"], ["blue sky here now"]]
    per_image = cider_per_image({0: "red cat", 1: "blue sky here now"}, dict(enumerate(references)))
    assert per_image[1] == pytest.approx(10)
    assert per_image[0] == pytest.approx(10 * 0.5 / 4)
    assert cider(["red cat", "blue sky here now"], references) == pytest.approx((10 + 1.25) / 2)


def test_cider_punishes_length_in_bigrams_and_clips_repetition() -> None:
    references = {0: ["red dog"], 1: ["blue sky"]}
    once, twice = (cider_per_image({0: text, 1: "x"}, references)[0] for text in ("red dog", "red dog red dog"))
    assert once == pytest.approx(5)  # no trigrams, no 4-grams
    assert twice < once * math.exp(-4 / 72) + 1e-12


def test_cider_refuses_other_images() -> None:
    with pytest.raises(ValueError, match="the same images"):
        cider({1: "a"}, {2: ["a"]})
    with pytest.raises(ValueError, match="has none"):
        cider({1: "a"}, {1: []})
