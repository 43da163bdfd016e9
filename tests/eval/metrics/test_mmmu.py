"""MMMU's two readings on answers written by hand, one for each turn of its script."""

from __future__ import annotations

import pytest

from eval.metrics.mmmu import mmmu_open_is_right, parse_mmmu_choice, parse_mmmu_open

CHOICES = ("the dog", "a cat", "Lisa", "12")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("A.,", "A"),
        ("A,.", None),  # each sign goes once, the comma before the period
        ("(C)", "C"),
        ("(A) is wrong, so (B)", "B"),
        ("(A), not B", "A"),  # a letter in parentheses goes before one between blanks
        ("B or A", "A"),
        ("A dog sits here", "A"),  # the article
        ("DNA", None),
        ("b", None),
        ("E", None),  # no such option
        ("B\n", None),
        ("Lisa", None),  # too short to look for the text of an option
        ("I think that this must be LISA", "C"),
        ("I think it is lisa and a cat", "B"),
        ("", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert parse_mmmu_choice(text, CHOICES) == letter


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("24.32", {24.32}),
        ("The total is 1,234.567.", {1234.0, 1234.57, 234.57}),
        ("x = 5", {5.0}),
        ("x = 5\nso y", {" y", "y "}),
        ("It is red. So blue", {"blue"}),  # "so " counts although the line goes on from a sentence
        ("A DOG", {"a dog"}),
        ("2e3 or 5,", {"2e3 or 5,", 2000.0, 3.0}),
        ("so :", {"so :"}),  # nothing but a sign behind the word
    ],
)
def test_what_a_free_answer_may_mean(text: str, meaning: set[str | float]) -> None:
    assert parse_mmmu_open(text) == meaning


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("The answer is 1.0649", ["1.06"], True),
        ("1.07", ["1.06"], False),
        ("It is in Tampa, I think", ["Tampa", "Florida"], True),
        ("florid", ["Tampa", "Florida"], False),
        ("2,000,000", ["2000000"], True),
        ("$MgS$", ["$MgS$", "MgS"], True),
        ("C", ["C"], True),
        ("car", ["C"], False),  # a letter needs a blank beside it
        ("5\nx = 6", ["5"], False),  # the last line announces an answer, so the others do not count
        ("5\n6", ["5"], True),
        ("", ["5"], False),
    ],
)
def test_free_answers(text: str, answers: list[str], right: bool) -> None:
    assert mmmu_open_is_right(text, answers) is right
