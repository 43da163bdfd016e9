"""VQA soft accuracy: every trap of the official scripts, and 400 cases scored by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eval.metrics.vqa import MODES, normalize_m4c, normalize_vizwiz, normalize_vqa, vqa_soft_accuracy

CASES = Path(__file__).parents[4] / "shared" / "goldens" / "vqa_soft_cases.json"


@pytest.mark.skipif(not CASES.is_file(), reason=f"{CASES} is not there")
@pytest.mark.parametrize(("key", "mode"), [("vqa_official", "official"), ("textvqa_m4c", "m4c")])
def test_400_cases_agree_with_the_official_scripts(key: str, mode: str) -> None:
    cases = json.loads(CASES.read_text())
    predictions = {row["question_id"]: row["answer"] for row in cases["predictions"]}
    assert len(cases["annotations"]) == 400
    for row in cases["annotations"]:
        answers = [answer["answer"] for answer in row["answers"]]
        found = vqa_soft_accuracy(predictions[row["question_id"]], answers, mode)
        assert found == pytest.approx(cases["scores"][key][str(row["question_id"])], abs=1e-9), row["question_id"]


@pytest.mark.parametrize(("matching", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_table_of_matching_answers(matching: int, score: float, mode: str) -> None:
    answers = ["red"] * matching + ["blue"] * (10 - matching)
    assert vqa_soft_accuracy("red", answers, mode) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("prediction", ["Yes", "yes.", "yes!", "the yes"])
def test_unanimous_answers_are_compared_letter_for_letter_officially(prediction: str) -> None:
    assert vqa_soft_accuracy(prediction, ["yes"] * 10) == 0
    assert vqa_soft_accuracy(prediction, ["yes"] * 10, "normalized") == 1
    assert vqa_soft_accuracy(prediction, ["yes"] * 9 + ["no"]) == 1


def test_vizwiz_normalises_the_prediction_only() -> None:
    assert vqa_soft_accuracy("Two", ["Two"] * 9 + ["2"], "vizwiz") == pytest.approx(0.3)
    assert vqa_soft_accuracy("Two", ["Two"] * 9 + ["2"]) == 1


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("dont", "don’t"),
        ("cant", "can't"),
        ("weve", "we've"),
        ("don't", "don't"),
        ("couldn'tve", "couldn’t’ve"),
        ("couldn’tve", "couldn’tve"),
        ("couldnt’ve", "couldn’t’ve"),
        ("hadn'tve", "hadn’t’ve"),
        ("mightn'tve", "mightn'tve"),
        ("somebody'd somebody’d", "somebody'd somebodyd"),
        ("The dog's", "dog's"),
    ],
)
def test_vizwiz_writes_typographic_apostrophes(text: str, normalized: str) -> None:
    assert normalize_vizwiz(text) == normalized
    assert vqa_soft_accuracy(text, [normalized] * 10, "vizwiz") == 1


@pytest.mark.parametrize(
    ("text", "official", "m4c"),
    [
        ("dog's", "dog's", "dog 's"),
        ("red,white", "red white", "redwhite"),
        ("red, white", "red white", "red white"),
        ("it's", "it's", "it 's"),
        ("5.", "5", "5"),
        ("5.5", "5.5", "5.5"),
        ("1,000", "1000", "1000"),
        ("A", "", ""),
        ("none", "0", "0"),
        ("Ten cats", "10 cats", "10 cats"),
        ("dont", "don't", "don't"),
        ("couldntve", "couldntve", "couldntve"),
        ("couldn'tve", "couldn't've", "couldn't've"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("Ive", "ive", "ive"),
        ("DONT", "don't", "don't"),
        ("ow's'at", "'ow's'at", "ow 's'at"),
        ("1,,000", "1 000", "1000"),
        ("a?b", "b", "ab"),
        ("x-b", "x b", "x b"),
        ("a -b", "b", "b"),
        ("x-y -z", "xy z", "xy z"),
        ("1,2 x-b", "12 xb", "12 x b"),
        ("." * 40, "." * 8, "." * 8),
        ("line\nbreak\ttab", "line break tab", "line break tab"),
    ],
)
def test_normalisation(text: str, official: str, m4c: str) -> None:
    assert normalize_vqa(text) == official
    assert normalize_m4c(text) == m4c


@pytest.mark.parametrize(
    ("answers", "mode"), [([], "official"), (["a"] * 9, "m4c"), (["a"], "best"), ("a", "official"), ([1], "vizwiz")]
)
def test_misuse_is_refused(answers: list[str], mode: str) -> None:
    with pytest.raises(ValueError, match=r"answers: expected|mode must be"):
        vqa_soft_accuracy("a", answers, mode)


@given(st.text(), st.lists(st.text(), min_size=10, max_size=10), st.sampled_from(MODES), st.randoms())
def test_order_of_answers_does_not_count(prediction: str, answers: list[str], mode: str, random: object) -> None:
    score = vqa_soft_accuracy(prediction, answers, mode)
    assert 0 <= score <= 1
    assert vqa_soft_accuracy(prediction, sorted(answers), mode) == pytest.approx(score)


@given(st.text(), st.lists(st.text(), min_size=10, max_size=10), st.integers(0, 10))
def test_modes_agree_on_what_is_normal_already(prediction: str, answers: list[str], copies: int) -> None:
    given = [prediction] * copies + answers[copies:]
    plain, *others = [normalize_vqa(text) for text in (prediction, *given)]
    assume([plain, *others] == [normalize_vqa(text) for text in (plain, *others)])
    score = vqa_soft_accuracy(plain, others, "normalized")
    assert vqa_soft_accuracy(plain, tuple(others)) == score
    assert score == pytest.approx((0, 0.3, 0.6, 0.9, 1)[min(4, others.count(plain))])
