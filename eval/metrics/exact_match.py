"""Exact match, as is and forgiving."""

from __future__ import annotations


def exact_match(prediction: str, target: str) -> float:
    """1.0 if the answer equals the target character for character (surrounding white space aside), else 0.0."""
    return float(prediction.strip() == target)


def lenient_exact_match(prediction: str, target: str) -> float:
    """Exact match that also forgives letter case and one closing period."""
    return float(prediction.strip().removesuffix(".").strip().lower() == target.lower())
