"""CIDEr of captions, without Java.

Official script: `pycocoevalcap/cider` of https://github.com/salaniz/pycocoevalcap (CIDEr-D; R. Vedantam et al., 2015).

The official script tokenizes with Stanford's PTBTokenizer (Java). `tokenize_caption` here APPROXIMATES it: lower case;
numbers, hyphenated words and abbreviations stay whole; clitics ("'s", "n't", ...), "cannot", "gonna" and their like are
split; other signs are tokens; then the punctuation that the official script drops is dropped. Not reproduced: PTB's
rules for addresses, fractions, currency names, emoticons, and its guess whether a period ends a sentence (PTB keeps
that of a final "a."). Report numbers for publication with the Java tokenizer; everything after tokenization is the
official arithmetic, in float64.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LONGEST = 4
_SIGMA = 6.0
_DROPPED = {"''", "'", "``", "`", "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}
_ABBREVIATIONS = "mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|ltd|co|corp|prof|gen|sgt|capt|lt|ave|blvd|rd|mt"
_TWO_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me"}
_TOKEN = re.compile(
    r"(?:[a-z]\.){2,}"  # u.s.
    rf"|(?:{_ABBREVIATIONS})\.(?=\s)"
    r"|\d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?:-\w+)*"
    r"|n't|'(?:s|re|ve|ll|d|m)(?!\w)"
    r"|\w+?(?=n't(?!\w))"
    r"|\w+(?:[-&/]\w+)*"
    r"|\.{3}|--|[^\w\s]"
)

Gram = tuple[str, ...]


def tokenize_caption(text: str) -> list[str]:
    """The tokens of a caption, lower-cased and without punctuation; see the module's docstring for what differs."""
    lower = text.replace("\n", " ").replace("’", "'").lower()
    tokens = [token for token in _TOKEN.findall(lower) if token not in _DROPPED]
    return [part for token in tokens for part in _TWO_WORDS.get(token, token).split()]


def cider_per_image(candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> dict[Any, float]:
    """CIDEr-D of each candidate (0 to 10), with document frequencies over the reference sets of exactly these images.

    Raises:
        ValueError: images differ, or one has no reference.
    """
    if set(candidates) != set(references) or not candidates:
        odd = sorted(map(str, set(candidates) ^ set(references)))[:3]
        raise ValueError(f"candidates and references must hold the same images, at least one; in one only: {odd}")
    counted = {image: [_grams(text) for text in texts] for image, texts in references.items()}
    empty = [image for image, texts in counted.items() if not texts]
    if empty:
        raise ValueError(f"references: image {empty[0]!r} has none")
    frequency = Counter(gram for texts in counted.values() for gram in set().union(*texts))
    log_images = math.log(len(counted))
    scores: dict[Any, float] = {}
    for image, caption in candidates.items():
        candidate = _weigh(_grams(caption), frequency, log_images)
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


def _grams(text: str) -> Counter[Gram]:
    tokens = tokenize_caption(text)
    lengths = range(1, _LONGEST + 1)
    return Counter(tuple(tokens[at : at + n]) for n in lengths for at in range(len(tokens) - n + 1))


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
