"""The core of De-focus Mamba (eqs. 5 and 9): the selective scan."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from .compiled_defocus import CompiledScan, CompilerError, load_library
from .kernels_defocus import at_least_float32, forced_backend, report_backend
from .triton_scan_defocus import triton_scan, why_unavailable

logger = logging.get_logger(__name__)


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
    kernel = scan_kernel(hidden_states)
    if kernel == "triton":
        return triton_scan(hidden_states, delta, decay_delta, A, B, C, initial)
    with torch.autocast(hidden_states.device.type, enabled=False):
        x = at_least_float32(hidden_states)
        batch, num_tokens, channels = x.shape
        A = x.new_zeros(channels, B.shape[-1]) if A is None else A.to(x.dtype)
        delta, decay_delta = (tensor.to(x.dtype).expand(x.shape) for tensor in (delta, decay_delta))
        B, C = (tensor.to(x.dtype).expand(batch, num_tokens, A.shape[1]) for tensor in (B, C))
        state_shape = (batch, *A.expand(channels, -1).shape)
        initial = x.new_zeros(state_shape) if initial is None else initial.to(x.dtype).expand(state_shape)
        scan = _plain_scan if kernel == "reference" else CompiledScan.apply
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
    return (states @ C[..., None]).squeeze(-1).transpose(0, 1), states[-1].clone()  # a view would keep all states


def scan_kernel(hidden_states: torch.Tensor) -> str:
    """Which core scans these tensors: "reference", "compiled" (CPU, where there is a compiler) or "triton" (GPU).

    Raises:
        ValueError: `DEFOCUS_KERNEL` names no backend.
        RuntimeError: a core is forced but cannot be had, or does not do these tensors.
    """
    forced = forced_backend("scan")
    if forced == "triton" or (forced is None and hidden_states.device.type == "cuda"):
        reason = why_unavailable(hidden_states)
        if reason is None:
            return report_backend("scan", "triton")
        if forced == "triton":
            raise RuntimeError(f"DEFOCUS_KERNEL=triton: {reason}")
        if not torch.compiler.is_compiling():
            logger.warning_once(f"De-focus Mamba runs with the slower plain scan: {reason}")
    suitable = hidden_states.device.type == "cpu" and hidden_states.dtype != torch.float64
    if forced is None and torch.compiler.is_compiling():
        return "reference"  # a tracer cannot look into the compiled core
    if forced == "reference" or (forced is None and not suitable):
        return report_backend("scan", "reference")
    if not suitable:
        raise RuntimeError(
            "DEFOCUS_KERNEL=compiled: the compiled core is for float32 on the CPU, "
            f"not {hidden_states.dtype} on {hidden_states.device.type}"
        )
    try:
        load_library()
    except CompilerError as error:
        if forced == "compiled":
            raise RuntimeError(f"DEFOCUS_KERNEL=compiled: {error}") from error
        logger.warning_once(f"De-focus Mamba runs with the slower plain scan: {error}")
        return report_backend("scan", "reference")
    return report_backend("scan", "compiled")
