"""Causal attention with a state of constant size: a window of keys, and a far field of what left it.

A key that left the window has a logit x of at most epsilon = e^{lambda W} max|q| max|k| / sqrt(channels), and its
weight e^x is 1 + x + O(epsilon^2). The ones need the number of such keys and the sum of their values; the x need sums
over keys, decayed and rotated as the memory of retention is. All of them have a constant size. The error is known, and
kept with the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .fold_defocus import scale_tokens
from .kernels_defocus import at_least_float32

# Up to this epsilon weights 1 + x are used, and beyond it weights of 1: there 1 + x could become negative.
_LARGEST_FIRST_ORDER = 0.5

_NOTHING = torch.empty(0)


@dataclass
class DefocusBoundedAttentionState:
    """What windowed causal attention carries; `DefocusBoundedAttentionState(window)` starts a sequence.

    Attributes:
        window: distance, in tokens, up to which a key is seen exactly.
        num_tokens: tokens so far.
        key, value: of the last `window` tokens at most, not rotated, (batch, heads, tokens, channels).
        far_value: sum of the values that left the window, (batch, heads, channels).
        far_key: sum of their keys, decayed and rotated relative to the last of them, (batch, heads, channels).
        memory: sum of outer products of the same keys and the values, (batch, heads, channels, channels).
        largest_query, largest_key: largest norms so far of a query and of a key that left the window, (batch, heads).
        error_bound: largest possible |output - exact output| / max|value| so far of each head, (batch, heads), in exact
            arithmetic, for the inputs that this mixer was given.
    """

    window: int
    num_tokens: int = 0
    key: torch.Tensor = _NOTHING
    value: torch.Tensor = _NOTHING
    far_value: torch.Tensor = _NOTHING
    far_key: torch.Tensor = _NOTHING
    memory: torch.Tensor = _NOTHING
    largest_query: torch.Tensor = _NOTHING
    largest_key: torch.Tensor = _NOTHING
    error_bound: torch.Tensor = _NOTHING

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"the window of bounded attention must be at least one token, not {self.window}")

    @property
    def num_far(self) -> int:
        """How many tokens have left the window."""
        return self.num_tokens - self.key.shape[2] if self.num_tokens else 0


def bounded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    theta: torch.Tensor | None,
    scaling: float,
    state: DefocusBoundedAttentionState,
) -> tuple[torch.Tensor, DefocusBoundedAttentionState]:
    """Attention (eq. 8) of the next tokens of a sequence: exact within the window, of first order beyond it.

    Args:
        query, key, value: of the next tokens, not rotated, (batch, heads, tokens, channels).
        decay: lambda, (heads,); None for no decay (the bound is then of little use).
        theta: (heads, channels / 2), or None.
        scaling: factor on the logits.
        state: of the tokens before these.

    Returns:
        (batch, heads, tokens, channels), in the dtype of `query`, and the state after these tokens.
    """
    outputs = []
    with torch.autocast(query.device.type, enabled=False):
        parts = (at_least_float32(x).split(state.window, dim=2) for x in (query, key, value))
        for q, k, v in zip(*parts, strict=True):
            rate = q.new_zeros(q.shape[1]) if decay is None else decay.to(q.dtype)
            output, state = _piece(q, k, v, rate, theta, scaling, state)
            outputs.append(output)
    return torch.cat(outputs, dim=2).to(query.dtype), state


def _piece(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rate: torch.Tensor,
    theta: torch.Tensor | None,
    scaling: float,
    state: DefocusBoundedAttentionState,
) -> tuple[torch.Tensor, DefocusBoundedAttentionState]:
    """At most a window of tokens."""
    queries = query.shape[2]
    if state.num_tokens == 0:
        state = _empty(state, query)
    else:
        key, value = torch.cat([state.key, key], dim=2), torch.cat([state.value, value], dim=2)
    keys = key.shape[2]
    largest_query = torch.maximum(state.largest_query, _largest_norm(query))
    state = replace(state, key=key, value=value, num_tokens=state.num_tokens + queries, largest_query=largest_query)

    # Relative to the token before the first kept one, the last that left: the far field's own place.
    time = torch.arange(1, keys + 1, device=query.device, dtype=torch.float64)
    turned = scale_tokens(query, None, theta, time[-queries:])
    logits = turned @ scale_tokens(key, None, theta, time).transpose(-1, -2) * scaling
    distance = time[-queries:, None] - time
    logits = logits * torch.exp(rate[:, None, None] * distance.abs().to(logits.dtype))
    logits = logits.masked_fill(distance < 0, -math.inf)
    highest = logits.amax(dim=-1, keepdim=True).clamp(min=0)
    weights = torch.exp(logits - highest)
    total, mixed = weights.sum(dim=-1, keepdim=True), weights @ value
    if state.num_far:
        far_total, far_mixed, state = _far_field(turned, time[-queries:], rate, scaling, state)
        total, mixed = total + torch.exp(-highest) * far_total, mixed + torch.exp(-highest) * far_mixed
    return mixed / total, _forget(state, rate, theta)


def _empty(state: DefocusBoundedAttentionState, query: torch.Tensor) -> DefocusBoundedAttentionState:
    batch, heads, _, channels = query.shape
    return replace(
        state,
        far_value=query.new_zeros(batch, heads, channels),
        far_key=query.new_zeros(batch, heads, channels),
        memory=query.new_zeros(batch, heads, channels, channels),
        largest_query=query.new_zeros(batch, heads),
        largest_key=query.new_zeros(batch, heads),
        error_bound=query.new_zeros(batch, heads),
    )


def _largest_norm(hidden_states: torch.Tensor) -> torch.Tensor:
    """(batch, heads) of (batch, heads, tokens, channels); no gradient."""
    return torch.linalg.vector_norm(hidden_states.detach(), dim=-1).amax(dim=2)


def _far_field(
    turned: torch.Tensor,
    time: torch.Tensor,
    rate: torch.Tensor,
    scaling: float,
    state: DefocusBoundedAttentionState,
) -> tuple[torch.Tensor, torch.Tensor, DefocusBoundedAttentionState]:
    """Sums of the weights and of the weighted values of the keys outside the window, and the state with its bound."""
    epsilon = torch.exp(rate.detach() * state.window) * state.largest_query * state.largest_key * scaling
    first_order = epsilon <= _LARGEST_FIRST_ORDER
    bound = torch.where(
        first_order, 2 * (torch.expm1(epsilon) - epsilon) / (1 - epsilon).clamp(min=0.5), 2 * torch.expm1(epsilon)
    )
    decayed = turned * (torch.exp(rate[:, None] * time.to(rate.dtype)) * scaling * first_order[:, :, None])[..., None]
    total = state.num_far + (decayed @ state.far_key[..., None])
    mixed = state.far_value[:, :, None] + decayed @ state.memory
    return total, mixed, replace(state, error_bound=torch.maximum(state.error_bound, bound))


def _forget(
    state: DefocusBoundedAttentionState, rate: torch.Tensor, theta: torch.Tensor | None
) -> DefocusBoundedAttentionState:
    """Move what is more than a window old from the keys and values to the far field."""
    leaving = state.key.shape[2] - state.window
    if leaving <= 0:
        return state
    key, value = state.key[:, :, :leaving], state.value[:, :, :leaving]
    time = torch.arange(1 - leaving, 1, device=key.device, dtype=torch.float64)
    moved = scale_tokens(key, -rate, theta, time)
    # The old sums are taken to the new place: the channels of every key decay and turn back by `leaving` tokens.
    columns = torch.cat([state.memory, state.far_key[..., None]], dim=-1).transpose(-1, -2)
    memory = scale_tokens(columns, -rate, theta, time[:1] - 1).transpose(-1, -2)
    return replace(
        state,
        key=state.key[:, :, leaving:].clone(),
        value=state.value[:, :, leaving:].clone(),
        far_value=state.far_value + value.sum(dim=2),
        far_key=memory[..., -1] + moved.sum(dim=2),
        memory=memory[..., :-1] + moved.transpose(-1, -2) @ value,
        largest_key=torch.maximum(state.largest_key, _largest_norm(key)),
    )
