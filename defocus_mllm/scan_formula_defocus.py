"""The selective scan (eqs. 5 and 9) and what surrounds it in De-focus Mamba: what every backend computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .kernels_defocus import group_rms_norm


@dataclass(frozen=True)
class ScanOptions:
    """What surrounds the scan; the default is nothing.

    Attributes:
        softplus: whether the step sizes are given before their softplus.
        scale: multiplies the step sizes after their softplus.
        group_size: channels that the norm after the scan takes together; 0 for no norm.
        eps: added to the mean square in that norm.
    """

    softplus: bool = False
    scale: float = 1.0
    group_size: int = 0
    eps: float = 0.0


class LinearRecurrence(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + increment_t, elementwise, (batch, tokens, ...); the states replace the increments."""

    @staticmethod
    def forward(decay: torch.Tensor, increment: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        previous = initial
        for state, factor in zip(increment.unbind(1), decay.unbind(1), strict=True):
            previous = state.addcmul_(factor, previous)
        return increment

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        decay, increment, initial = inputs
        ctx.mark_dirty(increment)
        ctx.save_for_backward(decay, output, initial)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        decay, states, initial = ctx.saved_tensors
        gradient = gradient.clone()
        following = gradient[:, -1]
        for earlier, factor in zip(reversed(gradient[:, :-1].unbind(1)), reversed(decay[:, 1:].unbind(1)), strict=True):
            following = earlier.addcmul_(factor, following)
        gradient_of_decay = torch.cat([gradient[:, :1] * initial[:, None], gradient[:, 1:] * states[:, :-1]], dim=1)
        return gradient_of_decay, gradient, gradient[:, 0] * decay[:, 0]


def plain_scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    decay_delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan as it stands, with the whole (tokens, batch, channels, states) in memory; see `selective_scan`."""
    increment = (delta * x)[..., None] * B[..., None, :]
    decay = torch.exp(decay_delta[..., None] * A).expand_as(increment)
    states = LinearRecurrence.apply(decay, increment, initial)
    return (states @ C[..., None]).squeeze(-1), states[:, -1]


def scan_formula(
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
    scan: Callable[..., tuple[torch.Tensor, torch.Tensor]] = plain_scan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan and what surrounds it; see `selective_scan`.

    Args:
        decay: the steps that the decay sees, (channels,) or like `delta`; None: those of `delta`.
        scan: takes x, delta, decay_delta, A, B, C and initial, of which the decays may be (1, 1, channels).
    """
    if options.softplus:
        delta = F.softplus(delta) * options.scale
    decay_delta = delta if decay is None else decay.view(1, 1, -1) if decay.ndim == 1 else decay
    output, last = scan(x, delta, decay_delta, A, B, C, initial)
    if options.group_size:
        output = group_rms_norm(output, options.group_size, options.eps)
    # Skip and gate follow the norm: inside the scan they would be normalised too, which is another model.
    if D is not None:
        output = output + D * x
    return output if gate is None else output * F.silu(gate), last
