"""Confidence intervals that respect clusters: questions about one image stand or fall together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.measures import Statistic, mean

RESAMPLES = 2000
SEED = 0
CONFIDENCE_95_Z = 1.959963984540054
_BLOCK = 250  # resamples drawn at once: bounds memory at 250 x clusters integers


def cluster_sums(components: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Add up the rows of each cluster: (samples, k) -> (clusters, k)."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((int(index.max()) + 1, components.shape[1]))
    np.add.at(sums, index, components)
    return sums


def resampled_statistics(sums: np.ndarray, statistic: Statistic, resamples: int, seed: int) -> np.ndarray:
    """Draw clusters with replacement `resamples` times; (clusters, k) -> the statistic of each draw (resamples,)."""
    generator = np.random.default_rng(seed)
    number = len(sums)
    draws = []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        weights = generator.multinomial(number, np.full(number, 1 / number), size=size)
        draws.append(statistic(weights @ sums))
    return np.concatenate(draws)


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (E. B. Wilson, 1927), honest at 0 % and 100 %, where resampling sees no spread."""
    share, z = successes / trials, CONFIDENCE_95_Z
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - margin) / scale
    high = 1.0 if successes == trials else (centre + margin) / scale
    return low, high


def estimate(
    components: np.ndarray,
    clusters: Sequence[str],
    statistic: Statistic = mean,
    cluster_name: str = "image",
    resamples: int = RESAMPLES,
    seed: int = SEED,
    largest: float | None = 1.0,
    is_centred: bool = False,
) -> dict[str, Any]:
    """Value, standard error and 95 % interval (percentile bootstrap over clusters) of a statistic of summed components.

    Args:
        components: (samples, k), what the statistic needs of each sample; for an accuracy (score, 1).
        clusters: the cluster of each sample.
        statistic: maps summed components (..., k) to values (...).
        largest: the largest value there is, if the smallest is 0; None if there are no such bounds, as of a difference.
        is_centred: the interval is the spread of the draws around their mean, put at the value: for a statistic that
            drawing itself raises, such as a chi-square, whose draws all lie above it.

    Where no draw differs because the value is 0 or the largest, or because there is one cluster only, the spread is not
    0: the interval is Wilson's then, with the number of clusters as the number of trials (the cautious reading: the
    answers within one cluster may be copies of each other), and there is no standard error. Without bounds one cluster
    has no interval (None). Clusters and draws in which the statistic is not a number (no question of some kind) do not
    count; where it is not a number at all, the value is None.

    Raises:
        ValueError: there are no samples.
    """
    if len(components) == 0:
        raise ValueError("no samples: a metric of nothing has no value")
    components = np.asarray(components, dtype=float)
    sums = cluster_sums(components, clusters)
    value = float(statistic(components.sum(axis=0)))  # in the order of the samples, as official scripts add up
    found: dict[str, Any] = {"value": value, "ci95": None, "se": None, "method": "none", "cluster": cluster_name}
    if not math.isfinite(value):
        return found | {"value": None}
    draws = resampled_statistics(sums, statistic, resamples, seed)
    draws = draws[np.isfinite(draws)]
    if np.allclose(draws, value, rtol=1e-12, atol=0):  # sums of another order differ in their last bits
        trials = int(np.isfinite(statistic(sums)).sum()) or len(sums)
        if trials == 1 or (largest is not None and value in (0.0, largest)):
            return found | _without_spread(value, trials, largest)
    low, high = np.percentile(draws, [2.5, 97.5])
    if is_centred:
        low, high = value + draws.mean() - high, value + draws.mean() - low
    spread = {"ci95": [float(low), float(high)], "se": float(draws.std(ddof=1))}
    method = "cluster_bootstrap_centred" if is_centred else "cluster_bootstrap"
    return found | spread | {"method": method, "B": resamples, "seed": seed}


def _without_spread(value: float, trials: int, largest: float | None) -> dict[str, Any]:
    """What stands in the place of a spread of 0: Wilson's interval, or nothing where there are no bounds."""
    if largest is None:
        return {}
    low, high = wilson_interval(value / largest * trials, trials)
    return {"ci95": [largest * low, largest * high], "method": "wilson"}
