"""Answers "yes" and "no": POPE's and MME's readings of them, POPE's scores and MME's points.

Official scripts: `evaluate.py` of https://github.com/AoiDragon/POPE (= `llava/eval/eval_pope.py`), and `calculation.py`
of MME's eval_tool.zip (https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from eval.measures import ratio
from eval.metrics.rows import check_mode, check_rows

READINGS = ("official", "lenient")
_PERCEPTION_NAMES = "existence count position color posters celebrity scene landmark artwork OCR"
PERCEPTION = tuple(_PERCEPTION_NAMES.split())
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def parse_pope(text: str) -> str:
    """POPE's reading: "no" if No, no or not stands alone before the first period; anything else is "yes".

    So "NO", "No!", "Nope", "" and "no\\nthere" are "yes", and "Yes, there is no doubt." is "no".
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_mme(text: str) -> str | None:
    """MME's reading: yes or no within the first four characters, whatever the case ("nothing" is "no"), or None."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def parse_yes_no_lenient(text: str) -> str | None:
    """The first word that is yes or no (or y, n, true, false, nope, yeah, not); None if there is none."""
    meaning = {"y": "yes", "true": "yes", "yeah": "yes", "n": "no", "false": "no", "nope": "no", "not": "no"}
    for word in re.findall(r"[a-z]+(?:'t)?", text.lower()):
        if word in ("yes", "no"):
            return str(word)
        if word in meaning:
            return meaning[word]
        if word.endswith("n't"):
            return "no"
    return None


def pope_counts(rows: Sequence[Mapping[str, Any]], key: str = "parsed") -> np.ndarray:
    """(rows, 5): one-hot of true positive, false positive, true negative, false negative, unread; positive = yes.

    `row[key]` is the answer read ("yes", "no" or None), `row["target"]` the truth ("yes" or "no"). None where the truth
    is yes is a false negative, like any other yes that the model did not say; only None where it is no is "unread".
    """
    place = {("yes", "yes"): 0, ("yes", "no"): 1, ("no", "no"): 2, ("no", "yes"): 3, (None, "yes"): 3, (None, "no"): 4}
    return np.eye(5)[[place[row[key], row["target"]] for row in rows]]


def pope_f1(sums: np.ndarray) -> np.ndarray:
    """F1 of "yes": the harmonic mean of precision and recall, 0 where both are."""
    precision, recall = pope_precision(sums), pope_recall(sums)
    return ratio(2 * precision * recall, precision + recall)


def pope_precision(sums: np.ndarray) -> np.ndarray:
    """TP / (TP + FP)."""
    return ratio(sums[..., 0], sums[..., 0] + sums[..., 1])


def pope_recall(sums: np.ndarray) -> np.ndarray:
    """TP / (TP + FN)."""
    return ratio(sums[..., 0], sums[..., 0] + sums[..., 3])


def pope_accuracy(sums: np.ndarray) -> np.ndarray:
    """(TP + TN) / all."""
    return ratio(sums[..., 0] + sums[..., 2], sums.sum(axis=-1))


def pope_yes_ratio(sums: np.ndarray) -> np.ndarray:
    """Share of answers "yes" (not of true ones)."""
    return ratio(sums[..., 0] + sums[..., 1], sums.sum(axis=-1))


POPE_STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f1": pope_f1,
    "accuracy": pope_accuracy,
    "precision": pope_precision,
    "recall": pope_recall,
    "yes_ratio": pope_yes_ratio,
}


def pope_scores(
    rows: Sequence[Mapping[str, Any]], mode: Literal["official", "lenient"] = "official"
) -> dict[str, float]:
    """f1, accuracy, precision, recall, yes_ratio and the share `unparsed`, each 0 to 1, of one of POPE's samplings.

    Rows are {"prediction": text, "label": yes|no}. `unparsed` is the share in which the forgiving reading finds neither
    yes nor no: the official one takes them as yes. Where the official script would divide by zero, the score is 0.

    Raises:
        ValueError: no rows, a missing key, a label that is neither yes nor no, or an unknown mode.
    """
    check_mode(mode, READINGS)
    check_rows(rows, ("prediction", "label"))
    lenient = [parse_yes_no_lenient(row["prediction"]) for row in rows]
    answers = [parse_pope(row["prediction"]) for row in rows] if mode == "official" else lenient
    read = [{"parsed": answer, "target": _label(row)} for row, answer in zip(rows, answers, strict=True)]
    sums = pope_counts(read).sum(axis=0)
    scores = {name: float(statistic(sums)) for name, statistic in POPE_STATISTICS.items()}
    return scores | {"unparsed": lenient.count(None) / len(rows)}


def _label(row: Mapping[str, Any]) -> str:
    label = str(row["label"]).strip().lower()
    if label not in ("yes", "no"):
        raise ValueError(f"'label' must be yes or no, found {row['label']!r}")
    return label


def mme_sums(rows: Sequence[Mapping[str, Any]], key: str = "score") -> np.ndarray:
    """(rows, 4 x categories): right answers, questions, images all right, images, category after category.

    Images are counted at the first of their rows. Rows hold `category`, `image` and the score (0 or 1) under `key`.
    """
    categories = (*PERCEPTION, *COGNITION)
    right: dict[tuple[str, str], list[bool]] = {}
    for row in rows:
        right.setdefault((row["category"], row["image"]), []).append(row[key] == 1)
    table = np.zeros((len(rows), len(categories), 4))
    counted: set[tuple[str, str]] = set()
    for number, row in enumerate(rows):
        image = (row["category"], row["image"])
        first = image not in counted
        counted.add(image)
        both = first and all(right[image])
        table[number, categories.index(row["category"])] = row[key], 1, both, first
    return table.reshape(len(rows), -1)


def mme_points(categories: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """The statistic over `mme_sums`: sum over these categories of 100 (accuracy + accuracy+), 0 to 200 each.

    accuracy+ is the share of images with both questions right; a category without rows gives nothing, and where none
    has rows, there are no points (not a number).
    """
    places = [(*PERCEPTION, *COGNITION).index(category) for category in categories]

    def statistic(sums: np.ndarray) -> np.ndarray:
        table = sums.reshape(*sums.shape[:-1], -1, 4)[..., places, :]
        shares = ratio(table[..., 0], table[..., 1]) + ratio(table[..., 2], table[..., 3])
        return np.where(table[..., 1].any(axis=-1), 100 * shares.sum(axis=-1), np.nan)

    return statistic


def mme_scores(
    rows: Sequence[Mapping[str, Any]], mode: Literal["official", "lenient"] = "official"
) -> dict[str, float]:
    """perception (0 to 2000), cognition (0 to 800), the points of each category (0 to 200), and the share `unparsed`.

    Rows are {"category", "image", "prediction": text, "label": yes|no}, two for each image of a category; an answer
    that is neither is wrong. A category without rows gives no points.

    Raises:
        ValueError: no rows, a missing key, an unknown category or mode, a label that is neither yes nor no, or an image
            with other than two questions, which the official script asserts.
    """
    check_mode(mode, READINGS)
    check_rows(rows, ("category", "image", "prediction", "label"))
    present = Counter((row["category"], row["image"]) for row in rows)
    unknown = sorted({str(category) for category, _ in present} - {*PERCEPTION, *COGNITION})
    if unknown:
        raise ValueError(f"'category' must be one of {', '.join((*PERCEPTION, *COGNITION))}, found {unknown}")
    odd = next((image for image, number in present.items() if number != 2), None)
    if odd is not None:
        raise ValueError(f"image {odd[1]!r} of {odd[0]} has {present[odd]} questions, expected two")
    parse = parse_mme if mode == "official" else parse_yes_no_lenient
    answers = [parse(row["prediction"]) for row in rows]
    scored = [dict(row) | {"score": float(answer == _label(row))} for row, answer in zip(rows, answers, strict=True)]
    sums = mme_sums(scored).sum(axis=0)
    categories = [name for name in (*PERCEPTION, *COGNITION) if any(name == category for category, _ in present)]
    groups = {"perception": PERCEPTION, "cognition": COGNITION} | {name: (name,) for name in categories}
    points = {name: float(np.nan_to_num(mme_points(members)(sums))) for name, members in groups.items()}
    return points | {"unparsed": answers.count(None) / len(rows)}
