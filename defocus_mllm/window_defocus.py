"""Window and far field: attention whose strong decay makes distant logits vanish, linear in the length.

Beyond a distance W every logit is at most epsilon = e^{lambda W} max|q| max|k| / sqrt(channels), and e^logit = 1 +
O(epsilon): all those keys have the same weight, and what is left of them is their number and the sum of their values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .fold_defocus import scale_tokens
from .kernels_defocus import at_least_float32

# Largest |lambda| x block. Logits of future keys reach e^50 max|q| max|k|, and with the largest window of
# `smallest_window`, e^50 = 2 max|q| max|k| / (sqrt(channels) eps), that stays within float32.
BLOCK_EXPONENT = 50.0


def far_logit(rate: float, window: int, norms: tuple[float, float], scaling: float) -> float:
    """epsilon: the largest logit, in magnitude, of a key `window` tokens or more before its query."""
    return math.exp(rate * window) * norms[0] * norms[1] * scaling


def far_field_error(epsilon: float) -> float:
    """Bound of |output - exact output| / max|value| when logits up to `epsilon` count as 0 (weights e^logit as 1).

    A weight is off by at most delta = e^epsilon - 1, and so is each of the two weighted sums that are divided:
    |error| <= sum_s |w_s - 1| |v_s - output| / sum_s 1, and |v_s - output| <= 2 max|value|.
    """
    return 2 * math.expm1(epsilon) if epsilon < 1 else math.inf


def smallest_window(rate: float, norms: tuple[float, float], scaling: float, dtype: torch.dtype) -> float:
    """The distance from which logits are below the rounding of a weight in `dtype`; not finite if there is none."""
    largest = norms[0] * norms[1] * scaling
    if not (math.isfinite(largest) and rate < 0):
        return math.inf
    return max(1.0, math.ceil(math.log(max(largest, 1e-30) * 2 / torch.finfo(dtype).eps) / -rate))


def windowed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    theta: torch.Tensor | None,
    scaling: float,
    window: int,
) -> torch.Tensor:
    """Causal attention of a whole sequence, exact within a window and uniform before it.

    The sequence is cut into blocks of `window` tokens. A block sees itself and the block before it exactly, so every
    key up to `window` tokens away, and all earlier keys as one: their mean value, weighted by their number.

    Args:
        query, key, value: not rotated, (batch, heads, tokens, channels).
        decay: lambda, (heads,); |lambda| times `window` at most `BLOCK_EXPONENT`.
        theta: (heads, pairs), or None.
        window: in tokens, from `smallest_window`.

    Returns:
        (batch, heads, tokens, channels), in at least float32. `far_field_error` bounds the error.
    """
    query, key, value = at_least_float32(query), at_least_float32(key), at_least_float32(value)
    num_tokens, dtype = query.shape[2], query.dtype
    blocks = -(-num_tokens // window)
    query, key, value = (
        F.pad(x, (0, 0, 0, blocks * window - num_tokens)).unflatten(2, (blocks, window)) for x in (query, key, value)
    )
    # Each block is its own centre.
    time = torch.arange(window, device=query.device, dtype=torch.float64) - (window - 1) / 2
    query = scale_tokens(query, decay, theta, time)
    nothing = torch.zeros_like(key[:, :, :1])
    before = torch.cat([nothing, scale_tokens(key[:, :, :-1], -decay, theta, time - window)], dim=2)
    keys = torch.cat([before, scale_tokens(key, -decay, theta, time), torch.zeros_like(key[..., :1, :])], dim=3)
    far = (torch.arange(blocks, device=value.device, dtype=dtype) - 1).clamp(min=0) * window
    sums = F.pad(value[:, :, :-2].sum(dim=3).cumsum(dim=2), (0, 0, min(2, blocks), 0))
    values = torch.cat(
        [
            torch.cat([nothing, value[:, :, :-1]], dim=2),
            value,
            (sums / far.clamp(min=1)[:, None])[..., None, :],
        ],
        dim=3,
    )
    bias = _window_bias(far, window)
    output = F.scaled_dot_product_attention(
        query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), attn_mask=bias, scale=scaling
    )
    return output.unflatten(0, value.shape[:2]).flatten(2, 3)[:, :, :num_tokens]


def _window_bias(far: torch.Tensor, window: int) -> torch.Tensor:
    """What is added to the logits, (1, blocks, window, 2 window + 1): 0, minus infinity, or ln(number of far keys)."""
    bias = far.new_zeros(1, len(far), window, 2 * window + 1)
    bias[:, 0, :, :window] = -math.inf  # the first block has none before it
    bias[..., window : 2 * window] = bias.new_full((window, window), -math.inf).triu(1)
    bias[..., -1] = far.log()[:, None]
    return bias
