"""The numerical cores behind the mixers: plain references, exact in any dtype and differentiable, and a dispatcher.

Each core computes one formula of the paper for a whole sequence or for its next piece. They take care of their own
precision: what is carried along the sequence is kept in at least float32, whatever the autocast.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from .compiled_defocus import CompiledScan, CompilerError, load_library

logger = logging.get_logger(__name__)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself in float32 or float64, else a copy in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


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


class _LinearRecurrence(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + increment_t, elementwise; time is the first dimension."""

    @staticmethod
    def forward(ctx: Any, decay: torch.Tensor, increment: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        states = increment.clone()
        previous = initial
        for state, factor in zip(states, decay, strict=True):
            state.addcmul_(factor, previous)
            previous = state
        ctx.save_for_backward(decay, states, initial)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        decay, states, initial = ctx.saved_tensors
        gradient = gradient.clone()
        for time in range(len(gradient) - 2, -1, -1):
            gradient[time].addcmul_(decay[time + 1], gradient[time + 1])
        gradient_of_decay = torch.empty_like(gradient)
        torch.mul(gradient[0], initial, out=gradient_of_decay[0])
        torch.mul(gradient[1:], states[:-1], out=gradient_of_decay[1:])
        return gradient_of_decay, gradient, gradient[0] * decay[0]


def selective_scan(
    hidden_states: torch.Tensor,
    delta: torch.Tensor,
    decay_delta: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor,
    C: torch.Tensor,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan of Mamba (eqs. 5 and 9) without skip and gate, for a sequence or its next piece.

    h_t = exp(decay_delta_t A) h_{t-1} + delta_t B_t x_t and y_t = sum over the states of C_t h_t.

    Args:
        hidden_states: x, (batch, tokens, channels).
        delta: step sizes, (batch, tokens, channels).
        decay_delta: the step sizes that the decay sees, broadcastable to `delta` (Mamba: `delta` itself).
        A: negative rates, (channels, states); None for no decay.
        B, C: rotated input and output weights, (batch, tokens, states).
        initial: h before the first token, (batch, channels, states); None for zeros.

    Returns:
        y, (batch, tokens, channels), and h after the last token; both in at least float32.
    """
    with torch.autocast(hidden_states.device.type, enabled=False):
        x = at_least_float32(hidden_states)
        batch, num_tokens, channels = x.shape
        A = x.new_zeros(channels, B.shape[-1]) if A is None else A.to(x.dtype)
        delta, decay_delta = (tensor.to(x.dtype).expand(x.shape) for tensor in (delta, decay_delta))
        B, C = (tensor.to(x.dtype).expand(batch, num_tokens, A.shape[1]) for tensor in (B, C))
        state_shape = (batch, *A.expand(channels, -1).shape)
        initial = x.new_zeros(state_shape) if initial is None else initial.to(x.dtype).expand(state_shape)
        scan = _plain_scan if scan_kernel(x) == "reference" else CompiledScan.apply
        return scan(x, delta, decay_delta, A.expand(channels, -1), B, C, initial)


def _plain_scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    decay_delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula as it stands, with the whole (tokens, batch, channels, states) in memory."""
    x, delta, decay_delta, B, C = (tensor.transpose(0, 1) for tensor in (x, delta, decay_delta, B, C))
    increment = (delta * x)[..., None] * B[..., None, :]
    states = _LinearRecurrence.apply(torch.exp(decay_delta[..., None] * A), increment, initial)
    return (states @ C[..., None]).squeeze(-1).transpose(0, 1), states[-1]


def scan_kernel(hidden_states: torch.Tensor) -> str:
    """Which core scans these tensors: "reference" or "compiled" (float32 on the CPU, where there is a compiler).

    `DEFOCUS_KERNEL=reference` or `compiled` in the environment forces one; "auto" is the default.

    Raises:
        ValueError: `DEFOCUS_KERNEL` is something else.
        RuntimeError: the compiled core is forced but cannot be had, or does not do these tensors.
    """
    wanted = os.environ.get("DEFOCUS_KERNEL", "auto")
    if wanted not in ("auto", "reference", "compiled"):
        raise ValueError(f"DEFOCUS_KERNEL must be auto, reference or compiled, not {wanted!r}")
    suitable = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32
    if wanted == "auto" and torch.compiler.is_compiling():
        return "reference"  # a tracer cannot look into the compiled core
    if wanted == "reference" or (wanted == "auto" and not suitable):
        return "reference"
    if not suitable:
        raise RuntimeError(
            "DEFOCUS_KERNEL=compiled: the compiled core is for float32 on the CPU, "
            f"not {hidden_states.dtype} on {hidden_states.device.type}"
        )
    try:
        load_library()
    except CompilerError as error:
        if wanted == "compiled":
            raise RuntimeError(f"DEFOCUS_KERNEL=compiled: {error}") from error
        logger.warning_once(f"De-focus Mamba runs with the slower plain scan: {error}")
        return "reference"
    return "compiled"


def group_rms_norm(hidden_states: torch.Tensor, group_size: int, eps: float) -> torch.Tensor:
    """Divide groups of `group_size` neighbouring channels by their root mean square; no weight.

    Source: the norm after the scan in `mamba_block.py` of the release. Returns at least float32, same shape.
    """
    groups = at_least_float32(hidden_states).unflatten(-1, (-1, group_size))
    return (groups * torch.rsqrt(groups.square().mean(dim=-1, keepdim=True) + eps)).flatten(-2)
