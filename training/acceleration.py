"""The levers of training speed and memory: activations computed twice, and a compiled model."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

BACKEND = "inductor"
"""Of torch.compile."""


def checkpoint_activations(model: nn.Module, frozen: Sequence[nn.Module] = ()) -> str:
    """Let every layer of `model` keep its input only, and compute the rest again for the backward pass.

    Args:
        frozen: modules that do not learn. Their layers are recomputed too, since gradients may pass through them.

    Returns:
        Which layers, for the log.

    Raises:
        ValueError: a part of the model has no layers that can do so, or a frozen layer has dropout of its own.
    """
    for part in model.modules():
        if not getattr(part, "supports_gradient_checkpointing", part is not model):
            raise ValueError(f"gradient_checkpointing: {type(part).__name__} does not support it; leave it off")
    assert isinstance(model, PreTrainedModel)
    model.activation_checkpointing_enable()
    # Only checkpoints of the reentrant kind need this hook; here it would take gradients through a frozen embedding.
    model.disable_input_require_grads()
    for layer in (layer for module in frozen for layer in checkpointed_layers(module)):
        if "training" in inspect.unwrap(type(layer).forward).__code__.co_names:
            raise ValueError(
                f"gradient_checkpointing: {type(layer).__name__} draws dropout itself where it is recomputed, so it "
                "cannot be frozen; train it too, or leave gradient_checkpointing off"
            )
    counts = Counter(type(layer).__name__ for layer in checkpointed_layers(model))
    if not counts:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} has no layers to recompute; leave it off")
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def checkpointed_layers(module: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers in `module` that compute their activations twice."""
    layers = (layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer))
    return [layer for layer in layers if layer.gradient_checkpointing]


def compile_in_place(model: nn.Module, device: torch.device) -> None:
    """Compile `model` when it is first called, as one graph; its parameters keep their names.

    Raises:
        ValueError: the compiler does not work here; it is tried with something small.
    """
    with explained_compilation():
        torch.compile(torch.square, backend=BACKEND)(torch.ones(2, device=device))
    model.compile(backend=BACKEND, fullgraph=True)


@contextlib.contextmanager
def explained_compilation() -> Iterator[None]:
    """Raise `ValueError` with one line for whatever torch.compile could not do inside."""
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(
            f"torch_compile: {reason} ({type(error).__name__}); continue with --torch_compile false"
        ) from error
