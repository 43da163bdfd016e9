"""Decay and rotation as one complex factor a token, and the condition under which they fold into queries and keys.

e^{lambda (t-s)} e^{i theta (t-s)} q.k = (e^{(lambda + i theta)(t-c)} q) . (e^{(-lambda + i theta)(s-c)} k) for any
centre c, with a pair of channels (2j, 2j+1) read as one complex number. Along the sequence one factor grows as the
other one falls, so the product is as exact as q.k itself while both stay in the range of the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .kernels_defocus import at_least_float32

# Neighbouring tokens that share a coarse phase: e^{i theta t} is the product of two tables much smaller than itself.
_STRIDE = 32


def fold(
    query: torch.Tensor, key: torch.Tensor, decay: torch.Tensor | None, theta: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated and decayed queries and keys, centred between the queries: their dot products are the logits of eq. 8.

    Args:
        query: of the last tokens, (batch, heads, queries, channels).
        key: of all tokens, (batch, heads, keys, channels).
        decay: lambda, (heads,), in tokens^-1; None for none. See `folds_safely`.
        theta: (heads, channels / 2), in radians a token; None for none.

    Returns:
        Both in their shapes and dtypes.
    """
    time, queries = _centred(query, key), query.shape[2]
    phases = None if theta is None else unit_phases(theta.detach(), time, at_least_float32(query).dtype)
    late = None if phases is None else phases[:, -queries:]
    query = scale_tokens(query, decay, theta, time[-queries:], late)
    return query, scale_tokens(key, None if decay is None else -decay, theta, time, phases)


def fold_images(
    query: torch.Tensor, key: torch.Tensor, decay: torch.Tensor | None, theta: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`fold` of one image of the batch after the other, without gradients.

    The folded tensors of an image fit into the cache and into memory that the previous one gave back.
    """
    if decay is None and theta is None:
        yield from zip(query.split(1), key.split(1), strict=True)
        return
    time, queries, dtype = _centred(query, key), query.shape[2], at_least_float32(query).dtype
    phases = None if theta is None else unit_phases(theta, time, dtype)
    late = None if phases is None else phases[:, -queries:]
    of_query = _table(decay, time[-queries:], late, dtype)
    of_key = _table(None if decay is None else -decay, time, phases, dtype)
    for q, k in zip(query.split(1), key.split(1), strict=True):
        yield (
            _multiply(at_least_float32(q), of_query).to(query.dtype),
            _multiply(at_least_float32(k), of_key).to(key.dtype),
        )


def _centred(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Places of the tokens of `key` relative to the middle of those of `query`, (keys,), float64."""
    keys = key.shape[2]
    return torch.arange(keys, device=key.device, dtype=torch.float64) + ((query.shape[2] + 1) / 2 - keys)


def unit_phases(theta: torch.Tensor, time: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e^{i theta t} at evenly spaced times, one apart: (heads, tokens, pairs), the complex type of `dtype`.

    Angles are computed in float64: 2,000 radians in float32 are off by 1e-4.
    """
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    tables = []
    for times in (time[::_STRIDE], time[:_STRIDE] - time[0]):
        angle = theta.double()[:, None, :] * times[:, None]
        tables.append(torch.complex(angle.cos(), angle.sin()).to(complex_dtype))
    coarse, fine = tables
    return (coarse[:, :, None] * fine[:, None]).flatten(1, 2)[:, : len(time)]


def scale_tokens(
    hidden_states: torch.Tensor,
    rate: torch.Tensor | None,
    theta: torch.Tensor | None,
    time: torch.Tensor,
    phases: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply the pairs of channels by e^{(rate + i theta) t}, in at least float32; differentiable but in the time.

    Args:
        hidden_states: (batch, heads, tokens, channels), or (batch, heads, blocks, tokens, channels).
        rate: (heads,), or None for no magnitude; one below the smallest normal number is raised to it.
        theta: (heads, channels / 2), or None for no rotation.
        time: t of each token, (tokens,), evenly spaced by one.
        phases: `unit_phases` of these times, if they are at hand.

    Returns:
        The shape and dtype of `hidden_states`.
    """
    if rate is None and theta is None:
        return hidden_states
    factors = at_least_float32(hidden_states)
    if theta is not None and phases is None:
        phases = unit_phases(theta.detach(), time, factors.dtype)
    with torch.no_grad():
        table = _table(rate, time, phases, factors.dtype)
        table = table[:, None] if factors.ndim == 5 else table
    return _ScaleTokens.apply(factors, rate, theta, time, table).to(hidden_states.dtype)


def _as_pairs(x: torch.Tensor) -> torch.Tensor:
    """Pairs of channels as complex numbers: (..., channels) to (..., channels / 2)."""
    if x.stride(-1) != 1 or x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]):
        x = x.contiguous()  # cannot be viewed as complex numbers where it lies
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _table(
    rate: torch.Tensor | None, time: torch.Tensor, phases: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """e^{(rate + i theta) t}: complex, (heads, tokens, pairs), or without phases real, (heads, tokens, 1)."""
    if rate is None:
        assert phases is not None
        return phases
    exponent = (rate.double()[:, None] * time).clamp(min=math.log(torch.finfo(dtype).tiny))
    magnitude = torch.exp(exponent).to(dtype)[..., None]
    return magnitude if phases is None else phases * magnitude


def _multiply(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(_as_pairs(x) * table).flatten(-2) if table.is_complex() else x * table


class _ScaleTokens(torch.autograd.Function):
    """y = x table, with table = e^{(rate + i theta) t}; autograd's own way through the table touches more tensors."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        rate: torch.Tensor | None,
        theta: torch.Tensor | None,
        time: torch.Tensor,
        table: torch.Tensor,
    ) -> torch.Tensor:
        return _multiply(x, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor | None, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rate, theta, time, table = ctx.saved_tensors
        if not table.is_complex():
            of_x = gradient * table
            parts = [of_x, x]
        else:
            of_x = _as_pairs(gradient) * table.conj_physical()
            parts = [of_x, _as_pairs(x)]
        of_rate = of_theta = None
        if any(ctx.needs_input_grad[1:3]):
            # Of y = x e^{z t}, the derivative with respect to z is t y, and conj(y) dy = conj(x) dx.
            product = (parts[0] * parts[1].conj()).sum(dim=(0, 2) if x.ndim == 5 else 0)  # (heads, tokens, pairs)
            weighted = torch.einsum("htk,t->hk", product, time.to(product.dtype))
            if rate is not None:
                of_rate = weighted.real.sum(dim=1).to(rate.dtype) if weighted.is_complex() else weighted.sum(dim=1)
            if theta is not None:
                of_theta = weighted.imag.to(theta.dtype)
        gradient_of_x = torch.view_as_real(of_x).flatten(-2) if of_x.is_complex() else of_x
        return gradient_of_x, of_rate, of_theta, None, None


def largest_norm(hidden_states: torch.Tensor) -> float:
    """The largest norm of a token's channels, of (..., tokens, channels)."""
    return torch.linalg.vector_norm(at_least_float32(hidden_states), dim=-1).max().item()


def folds_safely(
    rate: float,
    queries: int,
    keys: int,
    norms: tuple[float, float],
    channels: int,
    dtype: torch.dtype,
    future_is_computed: bool = False,
) -> bool:
    """Whether decay `rate` can be folded into the last `queries` of `keys` tokens, centred between those queries.

    With reach r = |rate| (queries - 1) / 2 the factors of queries and of the keys beside them lie in [e^-r, e^r].

    - Range: e^r times the largest norm stays below the largest number of the dtype; and what a folded channel loses
      below the smallest normal number, times e^r from the other side and summed over the channels, stays below the
      rounding of a logit of 1: r <= ln(1 / tiny) - ln(channels max(1, norm)).
    - Far keys: a key more than ln(1 / tiny) / |rate| before the centre gets too large a factor (`fold_table`), so the
      logit it could at most have then must be below rounding: r <= ln(1 / tiny) - ln(1 / eps) - ln(norm norm).
    - Future keys reach logits of e^{2r}. A kernel that masks them by filling never sees them; for one that adds minus
      infinity (`future_is_computed`) they must stay finite.

    Args:
        norms: largest norm of a query and of a key; anything not finite is unsafe.
        dtype: of the folded tensors.
    """
    reach = abs(rate) * (queries - 1) / 2
    info = torch.finfo(dtype)
    room = min(-math.log(info.tiny), math.log(info.max))
    query_norm, key_norm = norms
    if not (math.isfinite(rate) and math.isfinite(query_norm) and math.isfinite(key_norm)):
        return False
    largest = max(1.0, query_norm, key_norm)
    if reach + math.log(channels * largest) > room:
        return False
    if future_is_computed and 2 * reach + 2 * math.log(largest) > room:
        return False
    clamps = abs(rate) * (keys - 1 - (queries - 1) / 2) > -math.log(info.tiny)
    return not clamps or reach + 2 * math.log(largest) - math.log(info.eps) <= -math.log(info.tiny)


def folds_any(rate: float, num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether this decay folds safely into any queries and keys of a whole sequence whose logits are finite at all.

    Up to half the room of `folds_safely` (less the sum over channels), numbers large enough to leave it have products
    that overflow without any folding.
    """
    room = min(-math.log(torch.finfo(dtype).tiny), math.log(torch.finfo(dtype).max))
    return math.isfinite(rate) and -rate * (num_tokens - 1) / 2 <= room / 2 - 5
