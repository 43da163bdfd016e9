"""VQA soft accuracy: an answer is right in the measure in which ten people gave it.

Official scripts: `PythonEvaluationTools/vqaEvaluation/vqaEval.py` of https://github.com/GT-Vision-Lab/VQA (VQAv2 and
OK-VQA), `llava/eval/m4c_evaluator.py` of LLaVA (TextVQA; also in facebookresearch/mmf), `vqaEval.py` of the VizWiz API
(https://vizwiz.org/tasks-and-datasets/vqa; Q. Li).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from eval.metrics.rows import check_answers, check_mode

Mode = Literal["official", "normalized", "m4c", "vizwiz"]
MODES = ("official", "normalized", "m4c", "vizwiz")

_TEXTS_KEPT = 2**16
"""Normalised texts that are remembered: the ten people often answer alike, and both readings normalise the same."""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_DIGIT_COMMAS_DIGIT = re.compile(r"(?<=\d),+(?=\d)")
# The official pattern means "not between digits", but its lookbehind is misspelt as a lookahead: any period counts that
# no digit follows. Its `re.UNICODE` (32) is passed where the largest number of replacements stands.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Each word with one of its apostrophes forgotten -> the word; and the one that the official list has backwards."""
    forgotten = {"somebody'd": "somebodyd"}
    for word in _WITH_APOSTROPHES.split():
        places = [place for place, letter in enumerate(word) if letter == "'"]
        forgotten |= {word[:place] + word[place + 1 :]: word for place in places}
    return forgotten


_CONTRACTIONS = _contractions()
# VizWiz's copy of the list has typographic apostrophes, except in these words and, of the misspelt ones, in two.
_STRAIGHT_IN_VIZWIZ = ("ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've")
_MISSPELT_STRAIGHT_IN_VIZWIZ = ("couldn'tve", "hadn'tve")
_CONTRACTIONS_VIZWIZ = {
    misspelt if misspelt in _MISSPELT_STRAIGHT_IN_VIZWIZ else misspelt.replace("'", "’"): (
        word if word in _STRAIGHT_IN_VIZWIZ else word.replace("'", "’")
    )
    for misspelt, word in _CONTRACTIONS.items()
}


def vqa_soft_accuracy(prediction: str, answers: Sequence[str], mode: Mode = "official") -> float:
    """mean over the people of min(1, number of OTHER people who gave the prediction / 3), 0 to 1.

    Modes:
        official: VQAv2's script. It normalises only where people disagree: against ten equal answers the prediction
            must be equal letter for letter ("Yes" or "yes." against ten "yes" scores 0, as its authors intend).
        normalized: the same normalisation always, on both sides (as lmms-eval, up to its reading of "1,,000").
        m4c: TextVQA's processor, always, on both sides; it splits possessives ("dog's" -> "dog 's").
        vizwiz: normalises the prediction, never the answers; the apostrophes that it puts into contractions are mostly
            typographic ("dont" -> "don’t"), so that they seldom match what people typed.

    Raises:
        ValueError: unknown mode, no answers or a string in their place, or (m4c) not ten answers, which its script
            asserts.
    """
    check_mode(mode, MODES)
    check_answers(answers)
    if mode == "m4c" and len(answers) != 10:
        raise ValueError(f"answers: expected 10, found {len(answers)}")
    if mode == "m4c":
        prediction, given = normalize_m4c(prediction), [normalize_m4c(answer) for answer in answers]
    elif mode == "vizwiz":
        prediction, given = normalize_vizwiz(prediction), list(answers)
    else:
        prediction, given = _one_line(prediction), [_one_line(answer) for answer in answers]
        if mode == "normalized" or len(set(given)) > 1:
            prediction, given = normalize_vqa(prediction), [normalize_vqa(answer) for answer in given]
    equal = sum(answer == prediction for answer in given)
    others = ((equal - 1) if answer == prediction else equal for answer in given)
    return sum(min(1.0, other / 3) for other in others) / len(given)


@functools.lru_cache(_TEXTS_KEPT)
def normalize_vqa(text: str) -> str:
    """VQAv2's normalisation: punctuation, periods, letter case, number words, articles, contractions."""
    return _words(without_punctuation(_one_line(text)), _CONTRACTIONS)


def normalize_vizwiz(text: str) -> str:
    """VizWiz's normalisation, of predictions only: VQAv2's with another list of contractions."""
    return _words(without_punctuation(_one_line(text)), _CONTRACTIONS_VIZWIZ)


@functools.lru_cache(_TEXTS_KEPT)
def normalize_m4c(text: str) -> str:
    """TextVQA's normalisation: commas and question marks go first, possessives become words of their own."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_without_punctuation(_one_line(text), _DIGIT_COMMAS_DIGIT), _CONTRACTIONS)


def without_punctuation(text: str) -> str:
    """The part of VQAv2's normalisation that deletes punctuation marks and periods, or makes them spaces."""
    return _without_punctuation(text, _DIGIT_COMMA_DIGIT)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str, comma_in_number: re.Pattern[str]) -> str:
    """Delete a mark that stands at a space somewhere in the text (any, if a number has a comma), else make it a space.

    The tests look at the text as it came, while the replacements add up.
    """
    has_number_with_comma = comma_in_number.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        deleted = has_number_with_comma or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if deleted else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def _words(text: str, contractions: Mapping[str, str]) -> str:
    numbered = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in numbered if word not in _ARTICLES)
