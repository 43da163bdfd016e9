"""The selective scan in Triton for GPUs, forward and backward; it needs `triton`, which CUDA builds of torch bring.

One program scans a few channels of one sequence with their states in registers, so memory is read and written once per
token and no (batch, tokens, channels, states) tensor exists. The states before every 64th token are kept for the
backward pass, which computes those between again. Sums over channels and sequences are partial sums, added afterwards
in a fixed order: results repeat exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, no_type_check

import torch

try:
    import triton
    import triton.language as tl
except Exception as error:  # it is optional: not even a broken one may keep a checkpoint from loading
    triton = None
    _IMPORT_ERROR = str(error)

# Tokens between two states that are kept, and tokens whose states are in registers at once.
_SEGMENT = 64
_STEPS = 4
_WIDE_FROM = 32 * 2 * 4 * 132  # channels of all sequences together, from which a program has 32 channels instead of 8
_OLDEST = (3, 5)  # the first whose tuples of tensors these kernels were compiled with


def _problem_with_triton() -> str | None:
    if triton is None:
        return f"triton cannot be imported ({_IMPORT_ERROR}); CUDA builds of torch bring it, else: pip install triton"
    if tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) < _OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST))}"
    return None


_PROBLEM = _problem_with_triton()
_INTERPRETED = _PROBLEM is None and triton.knobs.runtime.interpret


def why_unavailable(tensor: torch.Tensor) -> str | None:
    """Why these kernels cannot scan a tensor like this one; None if they can."""
    if _PROBLEM is not None:
        return _PROBLEM
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton core computes in float32, not in {tensor.dtype}"
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and _INTERPRETED):
        return f"the Triton core is for GPUs, not for {tensor.device.type} (for tests: TRITON_INTERPRET=1 on the CPU)"
    return None


def _jit(function: Callable) -> Any:
    """`triton.jit` where Triton can be used; else the function, which is never called then."""
    return function if _PROBLEM is not None else triton.jit(function)


def _helper(function: Callable) -> Any:
    """`triton.jit` for what kernels call; a plain function under the interpreter, which is slow to enter others."""
    return function if _INTERPRETED else _jit(function)


# A tile of states is (states, channels). Loading A, whose states are contiguous, makes the compiler give every thread a
# few states of a few channels: sums over states and sums over channels then both need few shuffles in the one warp.
# `rates` is A / ln 2, since exp2 is one instruction and exp is several.


@_helper
@no_type_check
def _place(channels, states, STATES: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's sequence, channels and states; which of a tile exist, and where they are in (channels, states)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, STATES)
    exists = (state[:, None] < states) & (channel[None, :] < channels)
    return tl.program_id(1).to(tl.int64), channel, state, exists, channel[None, :] * states + state[:, None]


@_helper
@no_type_check
def _load(pointers, stride, token, tokens, index, size):
    """A token's row in float32; zeros from `size` on and after the last token."""
    inside = index < tl.where(token < tokens, size, 0)
    return tl.load(pointers + token * stride, mask=inside, other=0.0).to(tl.float32)


@_helper
@no_type_check
def _store(pointers, row, token, tokens, index, size):
    """Store a token's row of a contiguous tensor."""
    tl.store(pointers + token * size, row, mask=index < tl.where(token < tokens, size, 0))


@_helper
@no_type_check
def _next_states(h, rates, first, inputs, indices, sizes, STEPS: tl.constexpr):
    """STEPS + 1 states, of which `h`, that before token `first`, is the first, and B of these tokens.

    After the last token all inputs are zeros, which leaves a state as it is.
    """
    x_ptr, delta_ptr, decay_ptr, decay_stride, B_ptr = inputs
    channel, state = indices
    tokens, channels, states = sizes
    hs = (h,)
    bs = ()
    for step in tl.static_range(STEPS):
        x = _load(x_ptr, channels, first + step, tokens, channel, channels)
        delta = _load(delta_ptr, channels, first + step, tokens, channel, channels)
        decay = _load(decay_ptr, decay_stride, first + step, tokens, channel, channels)
        B = _load(B_ptr, states, first + step, tokens, state, states)
        h = tl.exp2(decay[None, :] * rates) * h + (x * delta)[None, :] * B[:, None]
        hs += (h,)
        bs += (B,)
    return hs, bs


@_jit
@no_type_check
def _forward_kernel(
    x_ptr, delta_ptr, decay_ptr, A_ptr, B_ptr, C_ptr, initial_ptr, output_ptr, last_ptr, kept_ptr,
    tokens, channels, states, decay_batch_stride, decay_stride, decay_channel_stride,
    KEEP: tl.constexpr, SEGMENT: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Scan CHANNELS channels (program id 0) of one sequence (program id 1)."""
    sequence, channel, state, exists, entry = _place(channels, states, STATES, CHANNELS)
    size = channels * states
    rates = tl.load(A_ptr + entry, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634
    h = tl.load(initial_ptr + sequence * size + entry, mask=exists, other=0.0).to(tl.float32)
    wide = sequence * tokens * channels + channel
    narrow = sequence * tokens * states + state
    decay_ptr += sequence * decay_batch_stride + channel * decay_channel_stride
    kept_ptr += sequence * tl.cdiv(tokens, SEGMENT) * size + entry
    inputs = (x_ptr + wide, delta_ptr + wide, decay_ptr, decay_stride, B_ptr + narrow)
    for first in range(0, tokens, STEPS):
        if KEEP and first % SEGMENT == 0:
            tl.store(kept_ptr + first // SEGMENT * size, h, mask=exists)
        hs, _ = _next_states(h, rates, first, inputs, (channel, state), (tokens, channels, states), STEPS)
        h = hs[STEPS]
        cs = ()  # loaded before anything is stored: the compiler may not move a load ahead of a store
        for step in tl.static_range(STEPS):
            cs += (_load(C_ptr + narrow, states, first + step, tokens, state, states),)
        for step in tl.static_range(STEPS):
            output = tl.sum(hs[step + 1] * cs[step][:, None], axis=0)
            _store(output_ptr + wide, output, first + step, tokens, channel, channels)
    tl.store(last_ptr + sequence * size + entry, h, mask=exists)


@_helper
@no_type_check
def _gradients(
    g, dA, hs, bs, rates, first, inputs, C_ptr, dy_ptr, outputs, indices, sizes,
    SHARED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Go back through STEPS tokens; `g`, the gradient of the state after them, becomes that of the state before."""
    x_ptr, delta_ptr, decay_ptr, decay_stride, _ = inputs
    dx_ptr, ddelta_ptr, ddecay_ptr, dB_ptr, dC_ptr = outputs
    channel, state = indices
    tokens, channels, states = sizes
    dys = ()
    cs = ()
    for step in tl.static_range(STEPS):
        dys += (_load(dy_ptr, channels, first + step, tokens, channel, channels),)
        cs += (_load(C_ptr, states, first + step, tokens, state, states),)
    for step in tl.static_range(STEPS - 1, -1, -1):
        x = _load(x_ptr, channels, first + step, tokens, channel, channels)
        delta = _load(delta_ptr, channels, first + step, tokens, channel, channels)
        decay = _load(decay_ptr, decay_stride, first + step, tokens, channel, channels)
        g += cs[step][:, None] * dys[step][None, :]
        dC = tl.sum(hs[step + 1] * dys[step][None, :], axis=1)
        dB = tl.sum(g * (x * delta)[None, :], axis=1)
        dinput = tl.sum(g * bs[step][:, None], axis=0)
        g *= tl.exp2(decay[None, :] * rates)
        dexponent = g * hs[step]
        dA += dexponent * decay[None, :]
        ddecay = tl.sum(dexponent * rates, axis=0) * 0.6931471805599453
        ddelta = dinput * x
        if SHARED:
            ddelta += ddecay
        else:
            _store(ddecay_ptr, ddecay, first + step, tokens, channel, channels)
        _store(dx_ptr, dinput * delta, first + step, tokens, channel, channels)
        _store(ddelta_ptr, ddelta, first + step, tokens, channel, channels)
        _store(dB_ptr, dB, first + step, tokens, state, states)
        _store(dC_ptr, dC, first + step, tokens, state, states)
    return g, dA


@_jit
@no_type_check
def _backward_kernel(
    x_ptr, delta_ptr, decay_ptr, A_ptr, B_ptr, C_ptr, kept_ptr, dy_ptr, dlast_ptr,
    dx_ptr, ddelta_ptr, ddecay_ptr, dA_ptr, dB_ptr, dC_ptr, dinitial_ptr, scratch_ptr,
    tokens, channels, states, decay_batch_stride, decay_stride, decay_channel_stride,
    SHARED: tl.constexpr, SEGMENT: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Go back through CHANNELS channels (program id 0) of one sequence (program id 1).

    The states of a segment are computed again twice: those before every STEPS-th token, which go to a scratch memory
    that stays in the cache, and then, last ones first, those between.
    """
    sequence, channel, state, exists, entry = _place(channels, states, STATES, CHANNELS)
    indices, sizes = (channel, state), (tokens, channels, states)
    size = channels * states
    rates = tl.load(A_ptr + entry, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634
    g = tl.load(dlast_ptr + sequence * size + entry, mask=exists, other=0.0)
    dA = tl.zeros([STATES, CHANNELS], tl.float32)
    wide, narrow = sequence * tokens * channels + channel, sequence * tokens * states + state
    program = sequence * tl.num_programs(0) + tl.program_id(0)
    own = program * tokens * states + state
    decay_ptr += sequence * decay_batch_stride + channel * decay_channel_stride
    inputs = (x_ptr + wide, delta_ptr + wide, decay_ptr, decay_stride, B_ptr + narrow)
    outputs = (dx_ptr + wide, ddelta_ptr + wide, ddecay_ptr + wide, dB_ptr + own, dC_ptr + own)
    scratch_ptr += program * (SEGMENT // STEPS * STATES * CHANNELS)
    scratch_ptr += tl.arange(0, CHANNELS)[None, :] * STATES + state[:, None]
    segments = tl.cdiv(tokens, SEGMENT)
    for back in range(segments):
        start = (segments - 1 - back) * SEGMENT
        h = tl.load(kept_ptr + (sequence * segments + start // SEGMENT) * size + entry, mask=exists, other=0.0)
        groups = tl.cdiv(tl.minimum(tokens - start, SEGMENT), STEPS)
        for group in range(groups):
            tl.store(scratch_ptr + group * STATES * CHANNELS, h)
            hs, _ = _next_states(h, rates, start + group * STEPS, inputs, indices, sizes, STEPS)
            h = hs[STEPS]
        tl.debug_barrier()  # a thread may load what another one has stored
        for back_group in range(groups):
            group = groups - 1 - back_group
            h = tl.load(scratch_ptr + group * STATES * CHANNELS)
            hs, bs = _next_states(h, rates, start + group * STEPS, inputs, indices, sizes, STEPS)
            g, dA = _gradients(
                g, dA, hs, bs, rates, start + group * STEPS,
                inputs, C_ptr + narrow, dy_ptr + wide, outputs, indices, sizes, SHARED, STEPS,
            )  # fmt: skip
        tl.debug_barrier()  # before the scratch memory is written again
    tl.store(dA_ptr + sequence * size + entry, dA, mask=exists)
    tl.store(dinitial_ptr + sequence * size + entry, g, mask=exists)


def triton_scan(
    hidden_states: torch.Tensor,
    delta: torch.Tensor,
    decay_delta: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor,
    C: torch.Tensor,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`selective_scan` for tensors of any dtypes, which are read as they are; computed and returned in float32.

    Where `decay_delta` is `delta` itself it is read once, where it is broadcast it is not written out.

    Raises:
        ValueError: a sequence is too long for the kernels' 32-bit indices.
    """
    batch, tokens, channels = hidden_states.shape
    states = B.shape[-1]
    if tokens * max(channels, states) >= 2**31:
        raise ValueError(f"the Triton core indexes with 32 bits: {tokens} tokens of {channels} channels are too many")
    decay = None if decay_delta is delta else decay_delta.expand(hidden_states.shape)
    A = hidden_states.new_zeros(channels, states, dtype=torch.float32) if A is None else A.expand(channels, states)
    initial = A.new_zeros(batch, channels, states) if initial is None else initial.expand(batch, channels, states)
    delta = delta.expand(hidden_states.shape)
    B, C = (tensor.expand(batch, tokens, states) for tensor in (B, C))
    inputs = (hidden_states, delta, decay_delta, A, B, C, initial)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    output, last, _ = _scan(hidden_states, delta, decay, A, B, C, initial, keep)
    return output, last


# The file is loaded again, under another name, with every checkpoint that carries it: each has operators of its own.
_NAMESPACE = re.sub(r"\W", "_", __name__)
_INPUTS = "Tensor x, Tensor delta, Tensor? decay_delta, Tensor A, Tensor B, Tensor C, Tensor initial"


@torch.library.custom_op(
    f"{_NAMESPACE}::scan", mutates_args=(), schema=f"({_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor)"
)
@no_type_check
def _scan(x, delta, decay_delta, A, B, C, initial, keep):
    """y, the last state, and (if `keep`) the states that the backward pass starts from."""
    x, delta, A, B, C, initial = (tensor.contiguous() for tensor in (x, delta, A, B, C, initial))
    outputs = _scan_shapes(x, delta, decay_delta, A, B, C, initial, keep)
    decay = delta if decay_delta is None else decay_delta
    with torch.cuda.device_of(x):
        _forward_kernel[_grid(x, A)](
            x, delta, decay, A, B, C, initial, *outputs,
            x.shape[1], *A.shape, *decay.stride(), KEEP=keep, **_sizes(x, A),
        )  # fmt: skip
    return outputs


@_scan.register_fake
@no_type_check
def _scan_shapes(x, delta, decay_delta, A, B, C, initial, keep):
    batch, tokens, channels = x.shape
    segments = -(-tokens // _SEGMENT) if keep else 0
    shapes = x.shape, initial.shape, (batch, segments, channels, A.shape[1])
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op(
    f"{_NAMESPACE}::scan_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor kept, Tensor dy, Tensor dlast)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@no_type_check
def _scan_backward(x, delta, decay_delta, A, B, C, initial, kept, dy, dlast):
    """The gradients of the seven inputs; that of `decay_delta` is empty, and part of delta's, if it is None."""
    gradients = _scan_backward_shapes(x, delta, decay_delta, A, B, C, initial, kept, dy, dlast)
    x, delta, A, B, C, dy, dlast = (tensor.contiguous() for tensor in (x, delta, A, B, C, dy, dlast))
    decay = delta if decay_delta is None else decay_delta
    grid, sizes = _grid(x, A), _sizes(x, A)
    of_A = torch.empty_like(dlast)
    of_B, of_C = (x.new_empty(x.shape[0], grid[0], *B.shape[1:], dtype=torch.float32) for _ in range(2))
    tile = sizes["SEGMENT"] // sizes["STEPS"] * sizes["STATES"] * sizes["CHANNELS"]
    scratch = x.new_empty(grid[1], grid[0], tile, dtype=torch.float32)
    of_x, of_delta, of_decay, _, _, _, of_initial = gradients
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            x, delta, decay, A, B, C, kept, dy, dlast, of_x, of_delta, of_decay, of_A, of_B, of_C, of_initial, scratch,
            x.shape[1], *A.shape, *decay.stride(), SHARED=decay_delta is None, **sizes,
        )  # fmt: skip
    sums = (of.sum(dim).to(like.dtype) for of, dim, like in ((of_A, 0, A), (of_B, 1, B), (of_C, 1, C)))
    return of_x, of_delta, of_decay, *sums, of_initial


@_scan_backward.register_fake
@no_type_check
def _scan_backward_shapes(x, delta, decay_delta, A, B, C, initial, kept, dy, dlast):
    decay = x.new_empty(0) if decay_delta is None else decay_delta
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, delta, decay, A, B, C, initial))


def _keep_inputs(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], output[2])


def _backward(ctx: Any, dy: torch.Tensor | None, dlast: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, delta, decay_delta, A, B, C, initial, kept = ctx.saved_tensors
    dy = torch.zeros_like(x, dtype=torch.float32) if dy is None else dy
    dlast = torch.zeros_like(initial, dtype=torch.float32) if dlast is None else dlast
    gradients = list(_scan_backward(x, delta, decay_delta, A, B, C, initial, kept, dy, dlast))
    if decay_delta is None:
        gradients[2] = None
    return *gradients, None


_scan.register_autograd(_backward, setup_context=_keep_inputs)


def _sizes(x: torch.Tensor, A: torch.Tensor) -> dict[str, int]:
    """Sizes and options of a program: a tile of at most 512 states, which leaves registers for a few tokens' tiles.

    A batch too small to give each scheduler of a large GPU two of the wide programs is cut into narrower ones.
    """
    states = triton.next_power_of_2(A.shape[1])
    channels = 32 if x.shape[0] * x.shape[2] >= _WIDE_FROM else 8
    channels = max(1, min(channels, 512 // states))
    sizes = {"SEGMENT": _SEGMENT, "STEPS": _STEPS, "STATES": states, "CHANNELS": channels}
    return {**sizes, "num_warps": 1, "enable_fp_fusion": True}  # fused: Triton 3.10 is to change the default


def _grid(x: torch.Tensor, A: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[2], _sizes(x, A)["CHANNELS"]), x.shape[0]
