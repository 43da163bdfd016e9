"""The scan of De-focus Mamba in plain torch, a few tokens at a time: no compiler, any device and dtype, little memory.

The (tokens, batch, states, channels) of a few tokens stay in the cache, where channels are neighbours: every operation
runs over them at full width. The backward pass computes each chunk again from the states before it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .scan_formula_defocus import LinearRecurrence, ScanOptions, scan_formula

# Elements of (tokens, batch, states, channels) that are worked on at once: 1 MB in float32.
_CHUNK_ELEMENTS = 2**18

# Powers of two take less than half of the time that powers of e take.
_LOG2_E = math.log2(math.e)

_Tensors = tuple[Any, ...]  # of tensors and None


def chunked_scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    decay: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    gate: torch.Tensor | None,
    initial: torch.Tensor,
    options: ScanOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scan_formula`, chunk by chunk."""
    constant = decay is not None and decay.ndim == 1
    tokenwise = (x, delta, None if constant else decay, B, C, gate)
    fixed = ((A * _LOG2_E).t().contiguous(), D, decay if constant else None)
    output, last = _ChunkedScan.apply(options, initial.transpose(1, 2).contiguous(), *fixed, *tokenwise)
    return output, last.transpose(1, 2).contiguous()


def _chunk(
    options: ScanOptions, initial: torch.Tensor, fixed: _Tensors, tokenwise: _Tensors
) -> tuple[torch.Tensor, torch.Tensor]:
    x, delta, decay, B, C, gate = tokenwise
    A, D, constant_decay = fixed
    decay = decay if constant_decay is None else constant_decay
    return scan_formula(x, delta, decay, A, B, C, D, gate, initial, options, _scan_channels_last)


def _scan_channels_last(
    x: torch.Tensor,
    delta: torch.Tensor,
    decay_delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`plain_scan` with A as (states, channels), in units of log2(e), and the state as (batch, states, channels)."""
    x, delta, decay_delta, B, C = (tensor.transpose(0, 1) for tensor in (x, delta, decay_delta, B, C))
    increment = (delta * x)[:, :, None, :] * B[..., None]
    decay = (decay_delta[:, :, None, :] * A).exp2().expand_as(increment)
    states = LinearRecurrence.apply(decay, increment, initial)
    # A copy: the last state outlives the others.
    return (C[:, :, None, :] @ states).squeeze(2).transpose(0, 1), states[-1].clone()


class _ChunkedScan(torch.autograd.Function):
    """Chunks one after the other; of the forward pass only the states between them are kept."""

    @staticmethod
    def forward(
        ctx: Any, options: ScanOptions, initial: torch.Tensor, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fixed, tokenwise = tensors[:3], tensors[3:]
        ctx.options = options
        ctx.length = max(1, _CHUNK_ELEMENTS // max(1, initial.numel()))
        outputs, states = [], [initial]
        for pieces in _split(tokenwise, ctx.length):
            output, state = _chunk(options, states[-1], fixed, pieces)
            outputs.append(output)
            states = [*states, state] if any(ctx.needs_input_grad) else [state]
        ctx.save_for_backward(*tensors, *states[:-1])
        return torch.cat(outputs, dim=1), states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: torch.Tensor, of_state: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing this computes them
        fixed, tokenwise, states = saved[:3], saved[3:9], saved[9:]
        of_fixed = [None if tensor is None else torch.zeros_like(tensor) for tensor in fixed]
        of_pieces = []
        pieces, ends = _split(tokenwise, ctx.length), of_output.split(ctx.length, dim=1)
        for state, piece, end in zip(reversed(states), reversed(pieces), reversed(ends), strict=True):
            of_state, more, of_piece = _chunk_backward(ctx.options, state, fixed, piece, end, of_state)
            for total, part in zip(of_fixed, more, strict=True):
                if total is not None:
                    total += part
            of_pieces.append(of_piece)
        of_tokenwise = [
            None if parts[0] is None else torch.cat(parts[::-1], dim=1) for parts in zip(*of_pieces, strict=True)
        ]
        return None, of_state, *of_fixed, *of_tokenwise


def _split(tokenwise: _Tensors, length: int) -> list[_Tensors]:
    """The chunks of (batch, tokens, ...), those of all tensors together; None has chunks None."""
    num_chunks = max(len(tensor.split(length, dim=1)) for tensor in tokenwise if tensor is not None)
    chunks = [(None,) * num_chunks if tensor is None else tensor.split(length, dim=1) for tensor in tokenwise]
    return list(zip(*chunks, strict=True))


def _chunk_backward(
    options: ScanOptions,
    initial: torch.Tensor,
    fixed: _Tensors,
    tokenwise: _Tensors,
    of_output: torch.Tensor,
    of_last: torch.Tensor,
) -> tuple[Any, _Tensors, _Tensors]:
    """The gradients of the last three arguments of `_chunk`; that of a None is None."""
    with torch.enable_grad(), torch.autocast(initial.device.type, enabled=False):
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in (initial, *fixed, *tokenwise)]
        outputs = _chunk(options, leaves[0], tuple(leaves[1:4]), tuple(leaves[4:]))
        found = iter(torch.autograd.grad(outputs, [x for x in leaves if x is not None], (of_output, of_last)))
    of_initial, *others = (None if x is None else next(found) for x in leaves)
    return of_initial, tuple(others[:3]), tuple(others[3:])
