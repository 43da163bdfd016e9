"""The core of De-focus RetNet (eq. 4): retention with a learnable decay."""

from __future__ import annotations

import torch

from .kernels_defocus import at_least_float32


def retention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    memory: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Retention (eq. 4): y_t = sum_{s<=t} (Q_t . K_s) e^{lambda (t-s)} V_s, for a sequence or its next piece.

    Args:
        query, key: rotated (and scaled), (batch, heads, tokens, channels).
        value: (batch, heads, tokens, value channels).
        decay: lambda, negative, (heads,), in tokens^-1; None for no decay.
        memory: sum over all earlier s of e^{lambda (t-s)} K_s V_s^T at the last earlier t, (batch, heads, channels,
            value channels); None at the start.

    Returns:
        y, (batch, heads, tokens, value channels), and the memory after the last token; both in at least float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = at_least_float32(query), at_least_float32(key), at_least_float32(value)
        num_heads, num_tokens = query.shape[1:3]
        rate = query.new_zeros(num_heads) if decay is None else decay.to(query.dtype)
        time = torch.arange(num_tokens, device=query.device, dtype=query.dtype)
        distance = time[:, None] - time
        # Future distances are clamped before the exponential: masked afterwards, their gradient would be infinity x 0.
        factor = torch.exp(rate[:, None, None] * distance.clamp(min=0)).tril()
        output = (query @ key.transpose(-1, -2) * factor) @ value
        to_end = torch.exp(rate[:, None] * (num_tokens - 1 - time))[..., None]
        increment = (key * to_end).transpose(-1, -2) @ value
        if memory is None:
            return output, increment
        from_start = torch.exp(rate[:, None] * (time + 1))[..., None]
        output = output + (query * from_start) @ memory
        return output, torch.exp(rate * num_tokens)[:, None, None] * memory + increment
