"""Whether a question can be answered: average precision and F1 of saying that it cannot.

VizWiz's second task. Its API scores confidences with scikit-learn; an answer that is "unanswerable" or not is a
confidence of 1 or 0, for which both scores are functions of four counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.measures import ratio


def unanswerable_counts(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(rows, 4): one-hot of true positive, false positive, true negative, false negative; positive = unanswerable.

    Rows hold two booleans: the truth, `unanswerable`, and what was said, `said_unanswerable`.
    """
    place = {(True, True): 0, (True, False): 1, (False, False): 2, (False, True): 3}
    return np.eye(4)[[place[bool(row["said_unanswerable"]), bool(row["unanswerable"])] for row in rows]]


def average_precision(sums: np.ndarray) -> np.ndarray:
    """The area below precision over recall, in steps, as `sklearn.metrics.average_precision_score`; 0 to 1.

    Two thresholds: the questions said to be unanswerable, then all of them, whose precision is the share of
    unanswerable ones. 0 where nothing is unanswerable, as there.
    """
    true_positive, false_positive, _, false_negative = np.moveaxis(sums, -1, 0)
    positive = true_positive + false_negative
    recall = ratio(true_positive, positive)
    precision = ratio(true_positive, true_positive + false_positive)
    return np.asarray(recall * precision + (1 - recall) * ratio(positive, sums.sum(axis=-1)))
