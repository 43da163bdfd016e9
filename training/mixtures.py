"""How several sources become the samples of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy

from training.sampling import mix_seed

MixtureStrategy = Literal["concatenate", "without_repetition", "with_repetition"]

_MIXTURE = 7
"""What a seed is for: which samples of a source are taken."""


@dataclass(frozen=True)
class Part:
    """A source's share of an epoch."""

    samples: Sequence[int] | numpy.ndarray
    """Which of its conversations, one after the other; one that is shown twice stands here twice."""
    epochs: float
    """How often each of its conversations is shown in an epoch, on average."""


def mix(sizes: Sequence[int], weights: Sequence[float], strategy: MixtureStrategy, seed: int) -> list[Part]:
    """The part of each source in an epoch.

    "concatenate": every conversation once. The other two keep the ratio of the weights: "without_repetition" shows
    none twice, so that one source is used up and the others are cut to a random part, the same in every epoch;
    "with_repetition" shows every one at least once, so that one source is shown once and the others more often.

    Args:
        sizes: conversations of each source.
        weights: of each source, positive; of no meaning to "concatenate".
        strategy: one of the above.
        seed: decides the random parts.

    Raises `ValueError` naming the source (by number) whose part would be empty.
    """
    if strategy == "concatenate":
        return [Part(range(size), 1.0) for size in sizes]
    ratios = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    scale = min(ratios) if strategy == "without_repetition" else max(ratios)
    parts = []
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        count = int(weight * scale * (1 + 1e-9))
        if not count:
            raise ValueError(f"mixture[{number}]: its weight {weight:g} leaves it without a sample; raise it")
        passes, rest = divmod(count, size)
        chosen = numpy.random.default_rng(mix_seed(seed, _MIXTURE, number)).permutation(size)[:rest]
        samples = numpy.concatenate([*[numpy.arange(size)] * passes, numpy.sort(chosen)]).astype(numpy.int32)
        parts.append(Part(samples, count / size))
    return parts
