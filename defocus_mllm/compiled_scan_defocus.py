"""The compiled scan and convolution of De-focus Mamba, as operators that autograd and torch.compile call."""

from __future__ import annotations

import ctypes
import math
import re
from typing import Any, no_type_check

import torch

from .compiled_defocus import load_library
from .scan_formula_defocus import ScanOptions

# Tokens between two states that the forward pass keeps for the backward pass: CHUNK in the source.
_CHUNK = 16
# The file is loaded again, under another name, with every checkpoint that carries it: each has operators of its own.
_NAMESPACE = re.sub(r"\W", "_", __name__)


def _structure(name: str, integers: str, reals: str, pointers: str) -> type[ctypes.Structure]:
    """A structure of the source, by the names of its members in order."""
    types = (ctypes.c_int64, ctypes.c_double, ctypes.c_void_p)
    members = [
        (member, kind)
        for names, kind in zip((integers, reals, pointers), types, strict=True)
        for member in names.split()
    ]
    return type(name, (ctypes.Structure,), {"_fields_": members})


_Convolution = _structure(
    "_Convolution",
    "batch tokens channels kernel threads in_stride",
    "",
    "in window weight bias d_out out d_in d_window d_weight d_bias",
)
_Scan = _structure(
    "_Scan",
    "batch tokens channels states threads parts group softplus B_stride C_stride gate_stride decay_stride decay_image",
    "eps scale",
    "x delta decay A B C D gate initial d_y d_last y last starts d_x d_delta d_decay d_A d_B d_C d_D d_gate d_initial",
)


def _call(function: str, structure: type[ctypes.Structure], **members: torch.Tensor | int | float | None) -> None:
    """Call a function of the source. A tensor that is None or has no elements is passed as NULL."""
    values = {
        name: (value.data_ptr() or None) if isinstance(value, torch.Tensor) else value
        for name, value in members.items()
    }
    if getattr(load_library(), function)(ctypes.byref(structure(**values, threads=torch.get_num_threads()))) != 0:
        raise MemoryError(f"{function}: no memory for a few tokens")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, channels) whose rows are contiguous and equally far apart throughout: itself, or a copy."""
    distance = tensor.stride(1)
    regular = tensor.stride(2) == 1 and (len(tensor) == 1 or tensor.stride(0) == tensor.shape[1] * distance)
    return tensor if regular else tensor.contiguous()


def compiled_convolution(
    inputs: torch.Tensor, window: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """SiLU of the causal convolution of float32 tensors on the CPU.

    Args:
        inputs: (batch, tokens, channels).
        window: the inputs before them, (batch, channels, kernel - 1); None for zeros.
        weight: (channels, kernel).
        bias: (channels,); None for none.

    Returns:
        (batch, tokens, channels).
    """
    return _convolve(inputs, window, weight, bias)


_CONVOLUTION = "Tensor inputs, Tensor? window, Tensor weight, Tensor? bias"


@torch.library.custom_op(
    f"{_NAMESPACE}::convolve", mutates_args=(), device_types="cpu", schema=f"({_CONVOLUTION}) -> Tensor"
)
@no_type_check
def _convolve(inputs, window, weight, bias):
    inputs, output = _rows(inputs), _convolve_shapes(inputs, window, weight, bias)
    sizes = _convolution_members(inputs, window, weight, bias)
    _call("defocus_convolution_forward", _Convolution, **sizes, out=output)
    return output


@_convolve.register_fake
@no_type_check
def _convolve_shapes(inputs, window, weight, bias):
    return inputs.new_empty(inputs.shape)


@no_type_check
def _convolution_members(inputs, window, weight, bias):
    batch, tokens, channels = inputs.shape
    sizes = {"batch": batch, "tokens": tokens, "channels": channels, "kernel": weight.shape[1]}
    window = None if window is None else window.contiguous()
    tensors = {"in": inputs, "window": window, "weight": weight.contiguous(), "bias": bias}
    return {**sizes, "in_stride": inputs.stride(1), **tensors}


@torch.library.custom_op(
    f"{_NAMESPACE}::convolve_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_CONVOLUTION}, Tensor gradient) -> (Tensor, Tensor, Tensor, Tensor)",
)
@no_type_check
def _convolve_backward(inputs, window, weight, bias, gradient):
    """The gradients of the four tensors; that of one that is None is empty."""
    inputs, batch = _rows(inputs), len(inputs)
    of_inputs, of_window, _, of_bias = _convolve_backward_shapes(inputs, window, weight, bias, gradient)
    of_weight, of_bias = inputs.new_empty(batch, *weight.shape), inputs.new_empty(batch, *of_bias.shape)
    _call(
        "defocus_convolution_backward",
        _Convolution,
        **_convolution_members(inputs, window, weight, bias),
        d_out=gradient.contiguous(),
        d_in=of_inputs,
        d_window=of_window,
        d_weight=of_weight,
        d_bias=of_bias,
    )
    return of_inputs, of_window, of_weight.sum(0), of_bias.sum(0)


@_convolve_backward.register_fake
@no_type_check
def _convolve_backward_shapes(inputs, window, weight, bias, gradient):
    return tuple(inputs.new_empty(0 if x is None else x.shape) for x in (inputs, window, weight, bias))


def _save_convolution(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_convolution(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors  # once: under checkpointing this computes them
    gradients = _convolve_backward(*tensors, gradient)
    return tuple(None if x is None else of for x, of in zip(tensors, gradients, strict=True))


_convolve.register_autograd(_differentiate_convolution, setup_context=_save_convolution)


def compiled_scan(
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
    """`scan_formula` of float32 tensors on the CPU, in one pass over memory."""
    tensors = (x, delta, decay, A, B, C, D, gate, initial)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    output, last, _ = _scan(*tensors, options.group_size, options.eps, options.softplus, options.scale, keep)
    return output, last


_TENSORS = (
    "Tensor x, Tensor delta, Tensor? decay, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate, Tensor initial"
)
_OPTIONS = "int group_size, float eps, bool softplus, float scale"


@no_type_check
def _scan_members(x, delta, decay, A, B, C, D, gate, initial, group_size, eps, softplus, scale):
    batch, tokens, channels = x.shape
    B, C, gate = _rows(B), _rows(C), None if gate is None else _rows(gate)
    members = {"batch": batch, "tokens": tokens, "channels": channels, "states": A.shape[1]}
    members |= {"group": group_size, "eps": eps, "softplus": softplus, "scale": scale, "parts": _parts(batch)}
    members |= {"B": B, "C": C, "gate": gate, "B_stride": B.stride(1), "C_stride": C.stride(1)}
    members |= {"gate_stride": 0 if gate is None else gate.stride(1)}
    varies = decay is not None and decay.ndim == 3
    members |= {"decay_stride": channels * varies, "decay_image": tokens * channels * varies}
    rest = {"x": x, "delta": delta, "decay": decay, "A": A, "D": D, "initial": initial}
    return members | {name: None if tensor is None else tensor.contiguous() for name, tensor in rest.items()}


def _parts(batch: int) -> int:
    """Into how many parts the channels of an image go, so that there are parts enough for every thread."""
    threads = torch.get_num_threads()
    return min(threads // math.gcd(batch, threads), math.ceil(4 * threads / max(batch, 1)))


@torch.library.custom_op(
    f"{_NAMESPACE}::scan",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, {_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor)",
)
@no_type_check
def _scan(x, delta, decay, A, B, C, D, gate, initial, group_size, eps, softplus, scale, keep):
    """y, the last states, and (if `keep`) the states that the backward pass starts from."""
    given = (x, delta, decay, A, B, C, D, gate, initial, group_size, eps, softplus, scale)
    output, last, starts = outputs = _scan_shapes(*given, keep)
    _call("defocus_scan_forward", _Scan, **_scan_members(*given), y=output, last=last, starts=starts)
    return outputs


@_scan.register_fake
@no_type_check
def _scan_shapes(x, delta, decay, A, B, C, D, gate, initial, group_size, eps, softplus, scale, keep):
    chunks = (x.shape[1] + _CHUNK - 1) // _CHUNK if keep else 0
    starts = x.new_empty(x.shape[0], chunks, A.shape[1], x.shape[2])  # len() would fix the batch size in a graph
    return x.new_empty(x.shape), x.new_empty(initial.shape), starts


@torch.library.custom_op(
    f"{_NAMESPACE}::scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, {_OPTIONS}, Tensor starts, Tensor of_output, Tensor of_last) -> Tensor[]",
)
@no_type_check
def _scan_backward(
    x, delta, decay, A, B, C, D, gate, initial, group_size, eps, softplus, scale, starts, of_output, of_last
):
    """The gradients of the nine tensors; that of one that is None is empty."""
    given = (x, delta, decay, A, B, C, D, gate, initial, group_size, eps, softplus, scale)
    members, batch = _scan_members(*given), len(x)
    names = ("d_x", "d_delta", "d_decay", "d_A", "d_B", "d_C", "d_D", "d_gate", "d_initial")
    gradients = dict(zip(names, _scan_backward_shapes(*given, starts, of_output, of_last), strict=True))
    # One sum for each image and part: they are worked on in parallel, and a fixed order of summation repeats exactly.
    partial = {name: x.new_empty(batch, *gradients[name].shape) for name in ("d_A", "d_D")}
    partial |= {name: x.new_empty(batch, members["parts"], *B.shape[1:]) for name in ("d_B", "d_C")}
    if decay is not None and decay.ndim == 1:
        partial["d_decay"] = x.new_empty(batch, *decay.shape)
    ends = {"starts": starts, "d_y": of_output.contiguous(), "d_last": of_last.contiguous()}
    _call("defocus_scan_backward", _Scan, **members, **ends, **(gradients | partial))
    for name, sums in partial.items():
        gradients[name] = sums.sum(1 if name in ("d_B", "d_C") else 0)
    return list(gradients.values())


@_scan_backward.register_fake
@no_type_check
def _scan_backward_shapes(x, delta, decay, A, B, C, D, gate, initial, *rest):
    tensors = (x, delta, decay, A, B, C, D, gate, initial)
    return [x.new_empty(0 if tensor is None else tensor.shape) for tensor in tensors]


def _save_scan(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:9], inputs[9:-1]
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _differentiate_scan(
    ctx: Any, of_output: torch.Tensor | None, of_last: torch.Tensor | None, _: Any
) -> tuple[torch.Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    of_output = torch.zeros_like(tensors[0]) if of_output is None else of_output
    of_last = torch.zeros_like(tensors[-1]) if of_last is None else of_last
    gradients = _scan_backward(*tensors, *ctx.options, starts, of_output, of_last)
    gradients = [None if x is None else of for x, of in zip(tensors, gradients, strict=True)]
    return *gradients, *(None for _ in ctx.options), None


_scan.register_autograd(_differentiate_scan, setup_context=_save_scan)
