"""Functions that choose by the numbers they meet, as operators that torch.compile calls without looking inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def opaque_operator(name: str, arguments: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function` as an operator of torch.library: a graph can hold it, and it runs as in eager mode.

    The result has the shape, dtype and device of the first argument, and is contiguous. The backward pass computes the
    function again and differentiates that, once.

    Args:
        name: of the operator.
        arguments: in the language of torch.library, for example "Tensor x, Tensor? bias, float scaling".
        function: takes these arguments.
    """
    # One process may hold this file twice, from the package and from a checkpoint.
    library = "defocus_" + "".join(c if c.isalnum() else "_" for c in __name__)

    def forward(*given: Any) -> torch.Tensor:
        return function(*given).contiguous()

    def backward(gradient: torch.Tensor, *given: Any) -> list[torch.Tensor]:
        return _gradients(function, gradient, given)

    schemas = (f"({arguments}) -> Tensor", f"(Tensor gradient, {arguments}) -> Tensor[]")
    operator = torch.library.custom_op(f"{library}::{name}", forward, mutates_args=(), schema=schemas[0])
    operator.register_fake(lambda first, *_: _like(first))
    of_backward = torch.library.custom_op(f"{library}::{name}_backward", backward, mutates_args=(), schema=schemas[1])
    of_backward.register_fake(lambda gradient, *given: [_like(x) for x in _tensors(given)])

    def differentiate(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        given = [next(tensors) if other is None else other[0] for other in ctx.others]
        gradients = iter(of_backward(gradient, *given))
        return tuple(next(gradients) if other is None else None for other in ctx.others)

    operator.register_autograd(differentiate, setup_context=_remember)
    return operator


def _tensors(given: tuple[Any, ...]) -> list[torch.Tensor]:
    return [x for x in given if isinstance(x, torch.Tensor)]


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*_tensors(inputs))
    ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]


def _gradients(
    function: Callable[..., torch.Tensor], gradient: torch.Tensor, given: tuple[Any, ...]
) -> list[torch.Tensor]:
    """Of every tensor among the arguments; inside an operator autograd does not record, but torch.func does."""

    def of_tensors(*values: torch.Tensor) -> torch.Tensor:
        left = iter(values)
        return function(*(next(left) if isinstance(x, torch.Tensor) else x for x in given))

    gradients = torch.func.vjp(of_tensors, *_tensors(given))[1](gradient)
    return [x.clone(memory_format=torch.contiguous_format) for x in gradients]
