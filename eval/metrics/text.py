"""Scores of short answers: ANLS (DocVQA, InfoVQA), relaxed accuracy (ChartQA), NLVR's two scores.

Official scripts: the evaluator of the Robust Reading Competition (https://rrc.cvc.uab.es/?ch=17), `metrics.py` of
https://github.com/google-research/pix2struct (ChartQA has none of its own), and `nlvr/metrics_images.py` of
https://github.com/lil-lab/nlvr.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.metrics.multiple_choice import circular_accuracy
from eval.metrics.rows import check_answers, check_rows
from eval.metrics.yes_no import parse_yes_no_lenient


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of one character."""
    distances = list(range(len(second) + 1))
    for row, letter in enumerate(first, 1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(second, 1):
            best = min(distances[column] + 1, distances[column - 1] + 1, diagonal + (letter != other))
            diagonal, distances[column] = distances[column], best
    return distances[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question: 1 - the smallest distance / length, 0 to 1.

    Both sides are lower-cased and their white space collapsed, but the length is that of the longer RAW text in upper
    case, in which "ß" or the ligature "ﬁ" are two letters. A similarity below `threshold` is 0; the threshold itself is
    kept. Two empty texts are equal.

    Raises:
        ValueError: there are no answers, or a string in their place.
    """
    check_answers(answers)
    given = " ".join(prediction.lower().split())
    similarities = []
    for answer in answers:
        length = max(len(answer.upper()), len(prediction.upper()))
        distance = edit_distance(" ".join(answer.lower().split()), given)
        similarities.append(1.0 - (distance / length if length else 0.0))
    best = max(similarities)
    return best if best >= threshold else 0.0


def anls_lenient(prediction: str, answers: Sequence[str]) -> float:
    """ANLS that also forgives what stands around the answer: further lines, white space, quotes, a closing period."""
    line = next(iter(prediction.strip().splitlines()), "")
    return max(anls(prediction, answers), anls(line.strip().removesuffix(".").strip(" \"'"), answers))


def relaxed_accuracy(prediction: str, target: str) -> float:
    """ChartQA: 1.0 if a number is within 5 % of the target's, or else the texts are equal in lower case.

    As in pix2struct: "7%" reads as 0.07, commas and signs of money are not read, a target of 0 is compared as text
    ("0.0" is wrong), and years pass within 5 % as well. Qwen-VL's script gives the two in the wrong order and so takes
    5 % of the prediction; lmms-eval and VLMEvalKit do not.
    """
    found, wanted = _number(prediction), _number(target)
    if found is not None and wanted:
        return float(abs(found - wanted) / abs(wanted) <= 0.05)
    return float(prediction.lower() == target.lower())


def relaxed_accuracy_lenient(prediction: str, target: str) -> float:
    """Relaxed accuracy that also forgives white space, a closing period, commas in numbers, "$" and "%"."""

    def plain(text: str) -> str:
        return text.strip().removesuffix(".").replace(",", "").replace("$", "").removesuffix("%").strip()

    return max(relaxed_accuracy(prediction, target), relaxed_accuracy(plain(prediction), plain(target)))


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def nlvr_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """precision: share of images right; consistency: share of sentences right for every box and permutation.

    Rows are {"identifier": "n-m", "label", "prediction"}, one per image (six permutations of each example); the
    sentence is n, whatever m. Predictions are read by `parse_nlvr`; a label is "true" or "false" in any letter case.
    """
    check_rows(rows, ("identifier", "label", "prediction"))
    right = [parse_nlvr(row["prediction"]) == str(row["label"]).lower() for row in rows]
    sentences = (str(row["identifier"]).split("-")[0] for row in rows)
    groups = [{"group": group, "correct": correct} for group, correct in zip(sentences, right, strict=True)]
    return {"precision": sum(right) / len(rows), "consistency": circular_accuracy(groups)}


def parse_nlvr(text: str) -> str | None:
    """How NLVR's script reads the line "PICTURE.png,`text`" of its CSV: "true", "false" or None, which is wrong.

    Letter case and white space behind do not count, nor does what follows a comma; a blank in front or a period does.
    """
    answer = text.rstrip().split(",")[0].lower()
    return answer if answer in ("true", "false") else None


def parse_nlvr_lenient(text: str) -> str | None:
    """A forgiving reading: the first word that says true or false, yes or no; None if there is none."""
    meaning = {"yes": "true", "no": "false", None: None}
    return meaning[parse_yes_no_lenient(text)]
