"""The scan of De-focus Mamba in plain torch, a few tokens at a time: no compiler, any device and dtype, little memory.

The (batch, tokens, states, channels) of a few tokens stay in the cache, where channels are neighbours: every operation
runs over them at full width, and each thread over its own sequences, whose numbers so stay in the cache of its core.
The backward pass computes each chunk again from the states before it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .scan_formula_defocus import LinearRecurrence, ScanOptions, scan_formula
from .scratch_defocus import scratch

# Tokens of a chunk at least, and elements of its (batch, tokens, states, channels): 1.5 MB in float32 where the batch
# allows it, 8 MB at most, which is what decides how many sequences go together.
_CHUNK = 16
_USUAL_ELEMENTS, _MOST_ELEMENTS = 3 * 2**17, 2**21

# Powers of two take less than half of the time that powers of e take.
_LOG2_E = math.log2(math.e)

# Tensors, some of which may be None.
_Tensors = tuple[Any, ...]


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
    fixed = ((A * _LOG2_E).t().contiguous(), D, decay if constant else None)
    batched = (initial.transpose(1, 2).contiguous(), x, delta, None if constant else decay, B, C, gate)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (*fixed, *batched))
    group = max(1, _MOST_ELEMENTS // (_CHUNK * A.numel()))
    done = [_ChunkedScan.apply(options, keep, *fixed, *sequences) for sequences in _split(batched, group, 0)]
    output, last = done[0] if len(done) == 1 else (torch.cat(parts) for parts in zip(*done, strict=True))
    return output, last.transpose(1, 2).contiguous()


def _chunk(
    options: ScanOptions,
    initial: torch.Tensor,
    fixed: _Tensors,
    tokenwise: _Tensors,
    memory: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, delta, decay, B, C, gate = tokenwise
    A, D, constant_decay = fixed
    decay = decay if constant_decay is None else constant_decay
    scan = functools.partial(_scan_channels_last, memory=memory)
    return scan_formula(x, delta, decay, A, B, C, D, gate, initial, options, scan)


def _scan_channels_last(
    x: torch.Tensor,
    delta: torch.Tensor,
    decay_delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial: torch.Tensor,
    memory: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`plain_scan` with A as (states, channels), in units of log2(e), and the state as (batch, states, channels).

    `memory`, (2, batch, tokens or more, states, channels), is written over; without it one can differentiate.
    """
    room = [None, None] if memory is None else memory[:, :, : x.shape[1]]
    increment = torch.mul((delta * x)[:, :, None, :], B[..., None], out=room[0])
    varies = decay_delta.shape == delta.shape
    decay = torch.mul(decay_delta[:, :, None, :], A, out=room[1] if varies else None).exp2_().expand_as(increment)
    states = LinearRecurrence.apply(decay, increment, initial)
    # A copy: the last state outlives the others.
    return (C[:, :, None, :] @ states).squeeze(2), states[:, -1].clone()


class _ChunkedScan(torch.autograd.Function):
    """Chunks one after the other; of the forward pass only the states between them are kept."""

    @staticmethod
    def forward(ctx: Any, options: ScanOptions, keep: bool, *tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        fixed, initial, tokenwise = tensors[:3], tensors[3], tensors[4:]
        length = min(tokenwise[0].shape[1], max(_CHUNK, _USUAL_ELEMENTS // max(1, initial.numel())))
        memory = scratch("states", (2, len(initial), length, *initial.shape[1:]), initial.dtype, initial.device)
        outputs, starts, state = [], [], initial
        for pieces in _split(tokenwise, length, 1):
            if keep:
                starts.append(state)
            output, state = _chunk(options, state, fixed, pieces, memory)
            outputs.append(output)
        ctx.options, ctx.length = options, length
        ctx.save_for_backward(*tensors, *starts)
        return torch.cat(outputs, dim=1), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: torch.Tensor, of_state: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing this computes them
        fixed, tokenwise, starts = saved[:3], saved[4:10], saved[10:]
        of_fixed = [None if tensor is None else torch.zeros_like(tensor) for tensor in fixed]
        of_pieces = []
        pieces, ends = _split(tokenwise, ctx.length, 1), of_output.split(ctx.length, dim=1)
        for start, piece, end in zip(reversed(starts), reversed(pieces), reversed(ends), strict=True):
            of_state, more, of_piece = _chunk_backward(ctx.options, start, fixed, piece, end, of_state)
            for total, part in zip(of_fixed, more, strict=True):
                if total is not None:
                    total += part
            of_pieces.append(of_piece)
        of_tokenwise = [
            None if parts[0] is None else torch.cat(parts[::-1], dim=1) for parts in zip(*of_pieces, strict=True)
        ]
        return None, None, *of_fixed, of_state, *of_tokenwise


def _split(tensors: _Tensors, size: int, dim: int) -> list[_Tensors]:
    """The pieces of all tensors together, `size` long in dimension `dim`; those of a None are None."""
    num_pieces = max(len(tensor.split(size, dim)) for tensor in tensors if tensor is not None)
    pieces = [(None,) * num_pieces if tensor is None else tensor.split(size, dim) for tensor in tensors]
    return list(zip(*pieces, strict=True))


def _chunk_backward(
    options: ScanOptions,
    initial: torch.Tensor,
    fixed: _Tensors,
    tokenwise: _Tensors,
    of_output: torch.Tensor,
    of_last: torch.Tensor,
) -> tuple[torch.Tensor, _Tensors, _Tensors]:
    """The gradients of the last three arguments of `_chunk`; that of a None is None."""
    with torch.enable_grad(), torch.autocast(initial.device.type, enabled=False):
        first, *others = (_leaf(x) for x in (initial, *fixed, *tokenwise))
        outputs = _chunk(options, first, tuple(others[:3]), tuple(others[3:]))
        given = [x for x in others if x is not None]
        of_initial, *found = torch.autograd.grad(outputs, [first, *given], (of_output, of_last))
    of_given = iter(found)
    of_others = [None if x is None else next(of_given) for x in others]
    return of_initial, tuple(of_others[:3]), tuple(of_others[3:])


def _leaf(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().requires_grad_()
