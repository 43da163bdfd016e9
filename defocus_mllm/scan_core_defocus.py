"""The core of De-focus Mamba (eqs. 5 and 9): the selective scan, and the causal convolution before it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .chunked_scan_defocus import chunked_scan
from .compiled_defocus import why_unavailable
from .compiled_scan_defocus import compiled_convolution, compiled_scan
from .kernels_defocus import at_least_float32, forced_backend, report_backend
from .scan_formula_defocus import ScanOptions, scan_formula
from .triton_scan_defocus import triton_scan
from .triton_scan_defocus import why_unavailable as why_no_triton

logger = logging.get_logger(__name__)

_SCANS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "reference": scan_formula,
    "chunked": chunked_scan,
    "compiled": compiled_scan,
    "triton": functools.partial(scan_formula, scan=triton_scan),
}


def selective_scan(
    hidden_states: torch.Tensor,
    delta: torch.Tensor,
    decay_delta: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor,
    C: torch.Tensor,
    initial: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    options: ScanOptions = ScanOptions(),  # noqa: B008 - it is frozen
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan of Mamba (eqs. 5 and 9) with what surrounds it, for a sequence or its next piece.

    h_t = exp(decay_delta_t A) h_{t-1} + delta_t B_t x_t and y_t = sum over the states of C_t h_t. Then come, each if it
    is given, the norm of `options`, the skip (y + D x) and the gate (y SiLU(gate)).

    Args:
        hidden_states: x, (batch, tokens, channels).
        delta: step sizes, not negative, (batch, tokens, channels); before their softplus if `options` says so.
        decay_delta: the step sizes that the decay sees, (channels,) or broadcastable to `delta`; None: the same steps.
        A: negative rates, (channels, states); None for no decay.
        B, C: rotated input and output weights, (batch, tokens, states).
        initial: h before the first token, (batch, channels, states); None for zeros.
        D: weight of the skip, (channels,).
        gate: (batch, tokens, channels).

    Returns:
        y, (batch, tokens, channels), and h after the last token; both in at least float32.

    Raises:
        ValueError: `DEFOCUS_KERNEL` names no backend.
        RuntimeError: a backend is forced that cannot be had, or does not do these tensors; a shape does not fit.
    """
    with torch.autocast(hidden_states.device.type, enabled=False):
        x = at_least_float32(hidden_states)
        batch, num_tokens, channels = x.shape
        state_shape = (batch, channels, B.shape[-1])
        A = x.new_zeros(state_shape[1:]) if A is None else A.to(x.dtype).expand(state_shape[1:])
        if decay_delta is not None:
            decay_delta = decay_delta.to(x.dtype).expand(channels if decay_delta.ndim < 2 else x.shape)
        B, C = (tensor.to(x.dtype).expand(batch, num_tokens, -1) for tensor in (B, C))
        initial = x.new_zeros(state_shape) if initial is None else initial.to(x.dtype).expand(state_shape)
        D = None if D is None else D.to(x.dtype).expand(channels)
        gate = None if gate is None else gate.to(x.dtype).expand(x.shape)
        scan = _SCANS[report_backend("scan", scan_kernel(x))]
        return scan(x, delta.to(x.dtype).expand(x.shape), decay_delta, A, B, C, D, gate, initial, options)


def causal_convolution(
    inputs: torch.Tensor, window: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """SiLU of the causal convolution of every channel with its own filter, for a sequence or its next piece.

    Args:
        inputs: (batch, tokens, channels).
        window: the inputs before them, (batch, channels, kernel - 1); None for zeros.
        weight: (channels, 1, kernel), the last element for the token itself.
        bias: (channels,); None for none.

    Returns:
        (batch, tokens, channels), in the dtype of `inputs`; computed in at least float32.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        x = at_least_float32(inputs)
        batch, num_tokens, channels = x.shape
        weight = weight.to(x.dtype).view(channels, -1)
        bias = None if bias is None else bias.to(x.dtype).expand(channels)
        width = weight.shape[1] - 1
        window = None if window is None else window.to(x.dtype).expand(batch, channels, width)
        if scan_kernel(x) == "compiled":
            return compiled_convolution(x, window, weight, bias).to(inputs.dtype)
        before = x.new_zeros(batch, width, channels) if window is None else window.transpose(1, 2)
        padded = torch.cat((before, x), dim=1)
        output = padded[:, width:] * weight[:, width]
        for place in range(width):
            output.addcmul_(padded[:, place : place + num_tokens], weight[:, place])
        return F.silu(output if bias is None else output.add_(bias)).to(inputs.dtype)


def scan_kernel(hidden_states: torch.Tensor) -> str:
    """Which backend scans these tensors.

    "triton" on a GPU where it is installed, "compiled" on a CPU with a compiler, and else "chunked" (plain torch). A
    tracer gets the "reference" instead of the latter, whose backward pass it cannot look into.

    Raises:
        ValueError: `DEFOCUS_KERNEL` names no backend.
        RuntimeError: a core is forced but cannot be had, or does not do these tensors.
    """
    forced = forced_backend("scan")
    if forced in ("reference", "chunked"):
        return forced
    if forced == "triton" or (forced is None and hidden_states.device.type == "cuda"):
        reason = why_no_triton(hidden_states)
        if reason is None:
            return "triton"
        if forced == "triton":
            raise RuntimeError(f"DEFOCUS_KERNEL=triton: {reason}")
        if not torch.compiler.is_compiling():
            logger.warning_once(f"De-focus Mamba runs with the slower scan in plain torch: {reason}")
    reason = why_unavailable(hidden_states.device.type, str(hidden_states.dtype))
    if reason is None:
        return "compiled"
    if forced == "compiled":
        raise RuntimeError(f"DEFOCUS_KERNEL=compiled: {reason}")
    return "reference" if torch.compiler.is_compiling() else "chunked"
