"""The core of De-focus attention (eq. 8): a decay that multiplies the logits."""

from __future__ import annotations

import torch


def defocus_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay_factor: torch.Tensor | None,
    visible: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """De-focus attention (eq. 8).

    The decay MULTIPLIES the logit before the softmax: a distant logit goes to 0, that is towards uniform attention. It
    is not an additive bias, which would suppress distant tokens instead.

    Args:
        query: rotated queries, (batch, heads, queries, channels).
        key, value: rotated keys and values, (batch, heads, keys, channels).
        decay_factor: e^{lambda |t-s|}, (heads, queries, keys), or None.
        visible: True where the query may see the key, (queries, keys), or None for all.
        scaling: factor on the logits, 1 / sqrt(channels).

    Returns:
        (batch, heads, queries, channels).
    """
    logits = query @ key.transpose(-1, -2)
    # The constants are folded into the (small) decay table: one pass over the logits instead of two.
    logits = logits * (scaling if decay_factor is None else (decay_factor * scaling).to(logits.dtype))
    if visible is not None:
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1) @ value
