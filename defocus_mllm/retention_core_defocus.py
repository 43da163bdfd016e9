"""The core of De-focus RetNet (eq. 4): retention with a learnable decay, at once or in chunks."""

from __future__ import annotations

import torch

from .fold_defocus import scale_tokens
from .kernels_defocus import at_least_float32, forced_backend, report_backend

# Tokens of a chunk: its table of pairs is then as large as its keys and values.
_CHUNK = 64
# Tokens rotated and mixed at once: the intermediate results of more fill new memory instead of the cache.
_SPAN = 1024


def rotated_retention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    theta: torch.Tensor | None,
    scaling: float,
    memory: torch.Tensor | None = None,
    past: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`retention` of queries and keys that are not rotated yet, in memory that grows with the output alone.

    Args:
        theta: rotary frequencies, (heads, channels / 2), in radians a token; None for no rotation.
        scaling: factor on the keys, 1 / sqrt(channels).
        past: number of earlier tokens.
    """
    time = past + torch.arange(query.shape[2], device=query.device, dtype=torch.float64)
    outputs = []
    for q, k, v, when in zip(*(x.split(_SPAN, dim=-2) for x in (query, key, value, time[:, None])), strict=True):
        q, k = (scale_tokens(x, None, theta, when[:, 0]) for x in (q, k))
        output, memory = retention(q, k * scaling, v, decay, memory)
        outputs.append(output)
    assert memory is not None
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), memory


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

    Raises:
        ValueError: `DEFOCUS_KERNEL` names no backend.
    """
    forced = forced_backend("retention")
    chunks = query.shape[2] // _CHUNK
    backend = report_backend("retention", forced or ("chunked" if query.shape[2] > _CHUNK else "reference"))
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = at_least_float32(query), at_least_float32(key), at_least_float32(value)
        rate = query.new_zeros(query.shape[1]) if decay is None else decay.to(query.dtype)
        if backend == "reference" or not chunks:
            return _piece(query, key, value, rate, memory)
        whole = chunks * _CHUNK
        output, memory = _chunked(query[:, :, :whole], key[:, :, :whole], value[:, :, :whole], rate, memory)
        if whole == query.shape[2]:
            return output, memory
        rest, memory = _piece(query[:, :, whole:], key[:, :, whole:], value[:, :, whole:], rate, memory)
        return torch.cat([output, rest], dim=2), memory


def _tables(rate: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decay between tokens, (heads, tokens, tokens); from the start and to the end, (heads, tokens, 1)."""
    time = torch.arange(num_tokens, device=rate.device, dtype=rate.dtype)
    distance = time[:, None] - time
    # Future distances are clamped before the exponential: masked afterwards, their gradient would be infinity x 0.
    factor = torch.exp(rate[:, None, None] * distance.clamp(min=0)).tril()
    from_start = torch.exp(rate[:, None] * (time + 1))[..., None]
    to_end = torch.exp(rate[:, None] * (num_tokens - 1 - time))[..., None]
    return factor, from_start, to_end


def _piece(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rate: torch.Tensor, memory: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula as it stands, with the table of all pairs of tokens."""
    factor, from_start, to_end = _tables(rate, query.shape[2])
    output = (query @ key.transpose(-1, -2) * factor) @ value
    increment = (key * to_end).transpose(-1, -2) @ value
    if memory is None:
        return output, increment
    output = output + (query * from_start) @ memory
    return output, torch.exp(rate * query.shape[2])[:, None, None] * memory + increment


def _chunked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rate: torch.Tensor, memory: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole chunks: the pairs within each, and what comes from before it through the memory."""
    factor, from_start, to_end = (table[:, None] for table in _tables(rate, _CHUNK))
    query, key, value = (x.unflatten(2, (-1, _CHUNK)) for x in (query, key, value))
    increments = (key * to_end).transpose(-1, -2) @ value
    across = torch.exp(rate * _CHUNK)[:, None, None]
    memories = [torch.zeros_like(increments[:, :, 0]) if memory is None else memory]
    for increment in increments.unbind(2):
        memories.append(torch.addcmul(increment, across, memories[-1]))
    output = (query @ key.transpose(-1, -2) * factor) @ value
    output = output + (query * from_start) @ torch.stack(memories[:-1], dim=2)
    return output.flatten(2, 3), memories[-1]
