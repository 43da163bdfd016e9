"""Decay and rotation as one complex factor a token, and the condition under which they fold into queries and keys.

e^{lambda (t-s)} e^{i theta (t-s)} q.k = (e^{(lambda + i theta)(t-c)} q) . (e^{(-lambda + i theta)(s-c)} k) for any
centre c, with a pair of channels (2j, 2j+1) read as one complex number. Along the sequence one factor grows as the
other one falls, so the product is as exact as q.k itself while both stay in the range of the dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .kernels_defocus import at_least_float32
from .scratch_defocus import scratch

# Neighbouring tokens that share a coarse phase: e^{i theta t} is the product of two tables much smaller than itself.
_STRIDE = 32
# Without gradients: tables up to this size are kept (1 MiB in float32), and memory for so many folded numbers (8 MiB).
_NUMBERS_OF_A_KEPT_TABLE = 2**18
_NUMBERS_KEPT = 2**21


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
    queries = query.shape[2]
    time = _centred(queries, key.shape[2], key.device)
    phases = None if theta is None else unit_phases(theta.detach(), time, at_least_float32(query).dtype)
    late = None if phases is None else phases[:, -queries:]
    query = scale_tokens(query, decay, theta, time[-queries:], late)
    return query, scale_tokens(key, None if decay is None else -decay, theta, time, phases)


def fold_images(
    query: torch.Tensor, key: torch.Tensor, decay: torch.Tensor | None, theta: torch.Tensor | None, images: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`fold` of `images` images of the batch after the other, without gradients.

    A result may lie where the previous one lay.
    """
    queries, keys, dtype = query.shape[2], key.shape[2], at_least_float32(query).dtype
    if decay is None and theta is None:
        yield from zip(query.split(images), key.split(images), strict=True)
        return
    if query.device.type == "cpu" and key[0].numel() <= _NUMBERS_OF_A_KEPT_TABLE:
        numbers = (None if x is None else at_least_float32(x).contiguous() for x in (decay, theta))
        rates, frequencies = (None if x is None else (tuple(x.shape), x.numpy().tobytes(), x.dtype) for x in numbers)
        of_query, of_key = _kept_tables(rates, frequencies, queries, keys, dtype)
    else:
        of_query, of_key = _tables(decay, theta, queries, keys, dtype)
    for q, k in zip(query.split(images), key.split(images), strict=True):
        yield _multiply_into("folded queries", q, of_query), _multiply_into("folded keys", k, of_key)


def images_at_once(key: torch.Tensor) -> int:
    """How many images of a batch are worth folding at once: as many as memory is kept for, and at least one."""
    return max(1, _NUMBERS_KEPT // key[0].numel())


def _multiply_into(use: str, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`x` times `table` in memory that the next call uses again, where that is worth it."""
    factors = at_least_float32(x)
    if not table.is_complex() or x.device.type != "cpu" or x.numel() > _NUMBERS_KEPT:
        return _multiply(factors, table).to(x.dtype)
    pairs = _as_pairs(factors)
    product = torch.mul(pairs, table, out=scratch(use, pairs.shape, pairs.dtype, x.device))
    return torch.view_as_real(product).flatten(-2).to(x.dtype)


def _tables(
    decay: torch.Tensor | None, theta: torch.Tensor | None, queries: int, keys: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the last `queries` of `keys` tokens as queries, and of all of them as keys."""
    filter_ = theta if decay is None else decay
    assert filter_ is not None
    time = _centred(queries, keys, filter_.device)
    phases = None if theta is None else unit_phases(theta, time, dtype)
    late = None if phases is None else phases[:, keys - queries :]
    of_query = _table(decay, time[keys - queries :], late, dtype)
    return of_query, _table(None if decay is None else -decay, time, phases, dtype)


@functools.lru_cache(maxsize=64)
def _kept_tables(
    decay: tuple[Any, ...] | None, theta: tuple[Any, ...] | None, queries: int, keys: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_tables` of these very numbers, each (shape, bytes, dtype); making them is dear for short sequences."""
    rates, frequencies = (
        None if x is None else torch.frombuffer(bytearray(x[1]), dtype=x[2]).view(x[0]) for x in (decay, theta)
    )
    return _tables(rates, frequencies, queries, keys, dtype)


def _centred(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Places of `keys` tokens relative to the middle of the last `queries` of them, (keys,), float64."""
    return torch.arange(keys, device=device, dtype=torch.float64) + ((queries + 1) / 2 - keys)


def unit_phases(theta: torch.Tensor, time: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e^{i theta t} at evenly spaced times, one apart: (heads, tokens, pairs), the complex type of `dtype`.

    Angles are computed in float64: 2,000 radians in float32 are off by 1e-4.
    """
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    starts = time[::_STRIDE]
    angle = theta.double()[:, None, :] * torch.cat([starts, time[:_STRIDE] - time[0]])[:, None]
    table = torch.complex(angle.cos(), angle.sin()).to(complex_dtype)
    coarse, fine = table[:, : len(starts)], table[:, len(starts) :]
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
    if torch.compiler.is_compiling():
        return _scale_in_real_numbers(factors, rate, theta, time).to(hidden_states.dtype)
    if theta is not None and phases is None:
        phases = unit_phases(theta.detach(), time, factors.dtype)
    with torch.no_grad():
        table = _table(rate, time, phases, factors.dtype)
        table = table[:, None] if factors.ndim == 5 else table
    return _ScaleTokens.apply(factors, rate, theta, time, table).to(hidden_states.dtype)


def _scale_in_real_numbers(
    x: torch.Tensor, rate: torch.Tensor | None, theta: torch.Tensor | None, time: torch.Tensor
) -> torch.Tensor:
    """The same without complex numbers, which a compiler cannot fuse."""
    across = (slice(None), None) if x.ndim == 5 else (slice(None),)
    if theta is not None:
        angle = theta.double()[:, None, :] * time[:, None]
        cosine, sine = (table.to(x.dtype)[across] for table in (angle.cos(), angle.sin()))
        real, imaginary = x[..., 0::2], x[..., 1::2]
        x = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1).flatten(-2)
    if rate is None:
        return x
    exponent = (rate.double()[:, None] * time).clamp(min=math.log(torch.finfo(x.dtype).tiny))
    return x * torch.exp(exponent).to(x.dtype)[..., None][across]


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
        pairs, of_pairs = (_as_pairs(x), _as_pairs(gradient)) if table.is_complex() else (x, gradient)
        of_x = of_pairs * table.conj_physical()
        of_rate = of_theta = None
        if any(ctx.needs_input_grad[1:3]):
            # Of y = x e^{z t}, the derivative with respect to z is t y, and conj(y) dy = conj(x) dx.
            weighted = torch.einsum("htk,t->hk", _sum_of_products(of_x, pairs), time.to(of_x.dtype))
            if rate is not None:
                of_rate = weighted.real.sum(dim=1).to(rate.dtype) if weighted.is_complex() else weighted.sum(dim=1)
            if theta is not None:
                of_theta = weighted.imag.to(theta.dtype)
        gradient_of_x = torch.view_as_real(of_x).flatten(-2) if of_x.is_complex() else of_x
        return gradient_of_x, of_rate, of_theta, None, None


def _sum_of_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of a conj(b) over batch (and blocks): (heads, tokens, pairs). Image by image, which a cache can hold."""
    total = torch.zeros_like(a[0])
    for ours, other in zip(a, b, strict=True):
        memory = scratch("conjugates", other.shape, other.dtype, other.device)
        total.addcmul_(ours, torch.conj_physical(other, out=memory))
    return total.sum(dim=1) if total.ndim == 4 else total


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


@functools.lru_cache(maxsize=4096)
def folds_any(rate: float, num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether this decay folds safely into any queries and keys of a whole sequence whose logits are finite at all.

    Up to half the room of `folds_safely` (less the sum over channels), numbers large enough to leave it have products
    that overflow without any folding.
    """
    room = min(-math.log(torch.finfo(dtype).tiny), math.log(torch.finfo(dtype).max))
    return math.isfinite(rate) and -rate * (num_tokens - 1) / 2 <= room / 2 - 5
