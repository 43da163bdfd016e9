"""What a metric is here: a statistic of sums over samples.

An accuracy is (sum of scores) / (number of samples), F1 a ratio of sums of hits and misses, MME's score and circular
accuracy sums over groups of samples. Written like this, any metric can be resampled: clusters are drawn by adding up
their summands, thousands of times a second, without parsing an answer again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = Mapping[str, Any]
"""A row of samples.jsonl: what a metric may look at."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""(..., k) sums -> (...) values."""


def mean(sums: np.ndarray) -> np.ndarray:
    """The statistic of a mean-type metric: `sums[..., 0]` is the sum of scores, `sums[..., 1]` their number.

    Not a number where that is 0.
    """
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the denominator is 0: what the official scripts say where they would divide by zero."""
    zeros = np.zeros(np.shape(denominator), dtype=float)
    return np.divide(numerator, denominator, out=zeros, where=np.asarray(denominator) > 0)


@dataclass(frozen=True)
class Style:
    """How a value is printed: multiplied by `scale`, with `digits` decimals and the unit behind it."""

    scale: float = 100.0
    digits: int = 2
    unit: str = " %"

    def text(self, value: float) -> str:
        """The value with its unit."""
        return f"{self.number(value)}{self.unit}"

    def number(self, value: float) -> str:
        """The value without its unit."""
        return f"{self.scale * value:.{self.digits}f}"


PERCENT = Style()


@dataclass(frozen=True)
class Metric:
    """A number computed from the rows of the samples: `value(rows)` = statistic(sum of summands(rows)).

    A metric of groups (all rotations of a question, both questions of an image) gives the group's summands to one of
    the group's rows and zeros to the others; the benchmark's clusters must then hold whole groups.
    """

    name: str
    summands: Callable[[Sequence[Row]], np.ndarray]
    """rows -> (rows, k), one row of summands for each sample, in order."""
    statistic: Statistic = mean
    """(..., k) sums -> (...) values; not a number where nothing is to be measured (no question of that kind)."""
    primary: bool = False
    style: Style = PERCENT
    largest: float | None = 1.0
    """The largest possible value, where the smallest is 0: at both the interval is Wilson's. None: there is none."""
    needs: str | None = None
    """Entry of the rows without which there is nothing to compute: data that only some installations have."""
    higher_is_better: bool = True
    is_centred: bool = False
    """How the interval is put at the value: see `eval.bootstrap.estimate`."""

    def applies_to(self, rows: Sequence[Row]) -> bool:
        """Whether the rows hold what the metric needs."""
        return self.needs is None or all(self.needs in row for row in rows)

    def value(self, rows: Sequence[Row]) -> float:
        """The metric of these rows."""
        return float(self.statistic(self.summands(rows).sum(axis=0)))


def mean_of(name: str, key: str = "score", **settings: Any) -> Metric:
    """The mean of one entry of the rows; `settings` are further fields of `Metric`."""

    def summands(rows: Sequence[Row]) -> np.ndarray:
        return np.array([[float(row[key]), 1.0] for row in rows])

    return Metric(name, summands, **settings)


def mean_within(name: str, key: str, category: str, label: str, **settings: Any) -> Metric:
    """The mean of one entry of the rows that have this label in a category of one label; `settings` as above."""

    def summands(rows: Sequence[Row]) -> np.ndarray:
        inside = [float(row["categories"][category] == label) for row in rows]
        return np.array([[weight * row[key], weight] for weight, row in zip(inside, rows, strict=True)])

    return Metric(name, summands, **settings)


def by_label(rows: Sequence[Row], summands: np.ndarray, category: str, labels: Sequence[str]) -> np.ndarray:
    """(rows, k) -> (rows, labels x k): the summands in the columns of the row's label, zeros in the others."""
    place = np.eye(len(labels))[[labels.index(row["categories"][category]) for row in rows]]
    return (place[:, :, None] * summands[:, None, :]).reshape(len(rows), -1)


def mean_of_labels(statistic: Statistic, labels: int) -> Statistic:
    """Over sums of `by_label`: the mean of the statistic over the labels that have rows."""

    def mean_over_those_present(sums: np.ndarray) -> np.ndarray:
        table = sums.reshape(*sums.shape[:-1], labels, -1)
        present = table.any(axis=-1)
        return np.asarray(np.where(present, statistic(table), 0.0).sum(axis=-1) / present.sum(axis=-1))

    return mean_over_those_present
