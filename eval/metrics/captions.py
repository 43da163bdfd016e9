"""CIDEr of captions, without Java.

Official script: `pycocoevalcap/cider` of https://github.com/salaniz/pycocoevalcap (CIDEr-D; R. Vedantam et al., 2015),
over the tokens of Stanford's PTBTokenizer (see `ptb`). All arithmetic in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.metrics.ptb import tokenize_captions

_LONGEST = 4
_SIGMA = 6.0

Gram = tuple[str, ...]


def cider_per_image(candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> dict[Any, float]:
    """CIDEr-D of each candidate (0 to 10), with document frequencies over the reference sets of exactly these images.

    The order of `references` counts where a caption ends in an abbreviation: its tokens depend on the next caption's.

    Raises:
        ValueError: images differ, or one has no reference.
    """
    if set(candidates) != set(references) or not candidates:
        odd = sorted(map(str, set(candidates) ^ set(references)))[:3]
        raise ValueError(f"candidates and references must hold the same images, at least one; in one only: {odd}")
    empty = [image for image, texts in references.items() if not texts]
    if empty:
        raise ValueError(f"references: image {empty[0]!r} has none")
    grams_of_all = iter(_grams([text for texts in references.values() for text in texts]))
    counted = {image: [next(grams_of_all) for _ in texts] for image, texts in references.items()}
    frequency = Counter(gram for texts in counted.values() for gram in set().union(*texts))
    log_images = math.log(len(counted))
    scores: dict[Any, float] = {}
    for image, grams_of_caption in zip(references, _grams([candidates[image] for image in references]), strict=True):
        candidate = _weigh(grams_of_caption, frequency, log_images)
        each = [_similarity(candidate, _weigh(grams, frequency, log_images)) for grams in counted[image]]
        scores[image] = 10.0 * float(np.mean(each))
    return scores


def cider(
    candidates: Mapping[Any, str] | Sequence[str],
    references: Mapping[Any, Sequence[str]] | Sequence[Sequence[str]],
) -> float:
    """CIDEr-D of a corpus, as the official script prints it (usually reported times 100).

    Image -> caption and image -> reference captions, or two sequences in the same order. A part of a corpus has another
    CIDEr than that part within the corpus: document frequencies change.
    """
    captions = candidates if isinstance(candidates, Mapping) else dict(enumerate(candidates))
    truths = references if isinstance(references, Mapping) else dict(enumerate(references))
    return float(np.mean(list(cider_per_image(captions, truths).values())))


def _grams(texts: Sequence[str]) -> list[Counter[Gram]]:
    """The 1- to 4-grams of each caption; a token with a blank in it ("1 1/2") is two words here, as officially."""
    counted = []
    for tokens in tokenize_captions(texts):
        words = " ".join(tokens).split()
        lengths = range(1, _LONGEST + 1)
        counted.append(Counter(tuple(words[at : at + n]) for n in lengths for at in range(len(words) - n + 1)))
    return counted


Weighed = tuple[list[dict[Gram, float]], list[float], int]


def _weigh(grams: Counter[Gram], frequency: Mapping[Gram, int], log_images: float) -> Weighed:
    """For each n: the tf-idf of the n-grams and their norm; and the caption's length in bigrams, as officially."""
    vectors: list[dict[Gram, float]] = [{} for _ in range(_LONGEST)]
    for gram, count in grams.items():
        vectors[len(gram) - 1][gram] = count * (log_images - math.log(max(1, frequency.get(gram, 0))))
    norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in vectors]
    return vectors, norms, sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(candidate: Weighed, reference: Weighed) -> float:
    penalty = math.exp(-((candidate[2] - reference[2]) ** 2) / (2 * _SIGMA**2))
    total = 0.0
    for mine, theirs, my_norm, their_norm in zip(candidate[0], reference[0], candidate[1], reference[1], strict=True):
        dot = sum(min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, value in mine.items())
        if my_norm and their_norm:
            dot /= my_norm * their_norm
        total += dot * penalty
    return total / _LONGEST
