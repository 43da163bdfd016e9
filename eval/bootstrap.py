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
    is_share: bool = True,
    is_centred: bool = False,
) -> dict[str, Any]:
    """Value, standard error and 95 % interval (percentile bootstrap over clusters) of a statistic of summed components.

    Args:
        components: (samples, k), what the statistic needs of each sample; for an accuracy (score, 1).
        clusters: the cluster of each sample.
        statistic: maps summed components (..., k) to values (...).
        is_share: False where 0 and 1 are values like any other, as of a difference.
        is_centred: the interval is the spread of the draws around their mean, put at the value: for a statistic that
            drawing itself raises, such as a chi-square, whose draws all lie above it.

    A share (accuracy, F1, ...) at 0 or 1, where no draw differs, gets Wilson's interval with the number of clusters as
    the number of trials (the cautious reading: the answers within one cluster may be copies of each other), and no
    standard error.

    Raises:
        ValueError: there are no samples.
    """
    if len(components) == 0:
        raise ValueError("no samples: a metric of nothing has no value")
    sums = cluster_sums(np.asarray(components, dtype=float), clusters)
    value = float(statistic(sums.sum(axis=0)))
    draws = resampled_statistics(sums, statistic, resamples, seed)
    if is_share and not is_centred and value in (0.0, 1.0) and (draws == value).all():
        interval = wilson_interval(value * len(sums), len(sums))
        return {"value": value, "ci95": list(interval), "se": None, "method": "wilson", "cluster": cluster_name}
    low, high = np.percentile(draws, [2.5, 97.5])
    if is_centred:
        low, high = value + draws.mean() - high, value + draws.mean() - low
    return {
        "value": value,
        "ci95": [float(low), float(high)],
        "se": float(draws.std(ddof=1)),
        "method": "cluster_bootstrap_centred" if is_centred else "cluster_bootstrap",
        "cluster": cluster_name,
        "B": resamples,
        "seed": seed,
    }
