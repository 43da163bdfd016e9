"""GQA's scores besides accuracy: consistency, validity, plausibility and distribution.

Official script: `eval.py` of https://cs.stanford.edu/people/dorarad/gqa/evaluate.html. Answers are compared after
LLaVA's conversion (closing periods off, lower case).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_NOT_A_STEP = ("exist", "query: name", "choose name")
_COMMON = ("color", "material", "shape")


def converted(text: str) -> str:
    """An answer as LLaVA's `convert_gqa_for_eval.py` hands it to the official script; white space stays."""
    return text.rstrip(".").lower()


def number_of_steps(semantic: Sequence[Mapping[str, Any]]) -> int:
    """Reasoning steps of a question: its operations, but for the last ones that only ask for existence or a name."""
    steps = (f"{operation['operation']}: {operation['argument']}" for operation in semantic)
    return sum(not any(ending in step for ending in _NOT_A_STEP) for step in steps)


def is_among(text: str, choices: Sequence[str], detailed: str) -> bool:
    """Whether an answer is among the valid or plausible choices; what things have in common has three of its own."""
    return converted(text) in (_COMMON if "Common" in detailed else choices)


def consistency_sums(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(rows, 2): of a question answered right, the share of entailed questions answered right, and 1; else zeros.

    `entailed` are the ids of the questions whose answers follow from the row's; without any of them among the rows, a
    question does not count.
    """
    scores = {row["id"]: float(row["score"]) for row in rows}
    sums = np.zeros((len(rows), 2))
    for at, row in enumerate(rows):
        entailed = [scores[other] for other in row["entailed"] if other in scores]
        if row["score"] and entailed:
            sums[at] = sum(entailed) / len(entailed), 1
    return sums


def consistency(sums: np.ndarray) -> np.ndarray:
    """The mean over right answers that entail others; 0 where there are none, as in the official script."""
    zeros = np.zeros(sums.shape[:-1])
    return np.divide(sums[..., 0], sums[..., 1], out=zeros, where=sums[..., 1] > 0)


def distribution_counts(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(rows, 3 x pairs) for `distribution`, where a pair is a group of questions (`group`) and a true answer in it.

    For each pair: is it this row's truth, is it what the row answers, is the row in the group. Questions without group
    (None), and answers that are true for no question of the group, do not count.
    """
    pairs: dict[tuple[str, str], int] = {}
    members: dict[str, list[int]] = {}
    for row in rows:
        pair = row["group"], row["target"]
        if row["group"] is not None and pair not in pairs:
            pairs[pair] = len(pairs)
            members.setdefault(row["group"], []).append(pairs[pair])
    counts = np.zeros((len(rows), len(pairs), 3))
    for at, row in enumerate(rows):
        if row["group"] is None:
            continue
        counts[at, pairs[row["group"], row["target"]], 0] = 1
        said = pairs.get((row["group"], converted(row["text"])))
        if said is not None:
            counts[at, said, 1] = 1
        counts[at, members[row["group"]], 2] = 1
    return counts.reshape(len(rows), -1)


def distribution(sums: np.ndarray) -> np.ndarray:
    """Chi-square of predicted against true answers, averaged over groups by their questions, over 100; less is better.

    (..., 3 x pairs) of `distribution_counts` -> (...). 0 where no question has a group.
    """
    true, predicted, size = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    squares = np.divide((predicted - true) ** 2, true, out=np.zeros_like(true), where=true > 0)
    total = true.sum(axis=-1)
    weighted = (squares * size).sum(axis=-1)
    return np.asarray(np.divide(weighted, total, out=np.zeros_like(total), where=total > 0) / 100)
