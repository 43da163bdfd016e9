"""The learnable band-pass filter of De-focus attention: decay and rotary frequencies.

A token at distance t - s is weighted by e^{lambda (t-s)} e^{i theta (t-s)} (paper, eqs. 4, 7 and 8): lambda < 0 sets
the width of the pass band, theta its centre. lambda = -exp(lambda_hat) keeps the sign during training.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from .kernels_defocus import at_least_float32

# The paper does not publish initial values for De-focus ViT and RetNet. These cover distances from about 3 tokens
# (lambda = -e^-1) to 150 tokens (lambda = -e^-5) over the heads, and wave lengths from 6 to 628 tokens.
LAMBDA_HAT_RANGE = (-5.0, -1.0)
THETA_RANGE = (1.0, 0.01)


def register(module: nn.Module, name: str, mode: str, *shape: int) -> None:
    """Give `module` a float32 tensor: a parameter ("learnable"), a buffer that no optimizer reaches ("fixed"), or None.

    Float32 whatever the default: a model built in 16 bits keeps its phases and rates.
    """
    if mode == "fixed":
        module.register_buffer(name, torch.empty(shape, dtype=torch.float32))
    else:
        tensor = None if mode == "none" else nn.Parameter(torch.empty(shape, dtype=torch.float32))
        module.register_parameter(name, tensor)


class DefocusBandPass(nn.Module):
    """Decay `lambda` (one per head) and frequencies `theta` (one per head and pair of channels).

    Args:
        num_heads: number of heads.
        num_frequencies: pairs of channels in a head.
        decay, rotary: "learnable", "fixed" (kept at the initial values) or "none" (no such factor).
    """

    lambda_hat: torch.Tensor | None
    theta: torch.Tensor | None

    def __init__(self, num_heads: int, num_frequencies: int, decay: str, rotary: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_frequencies = num_frequencies
        register(self, "lambda_hat", decay, num_heads)
        register(self, "theta", rotary, num_heads, num_frequencies)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values: lambda_hat evenly spaced over the heads, theta geometrically over the pairs."""
        if self.lambda_hat is not None:
            values = torch.linspace(*LAMBDA_HAT_RANGE, self.num_heads)
            init.copy_(self.lambda_hat, values)
        if self.theta is not None:
            first, last = THETA_RANGE
            steps = torch.linspace(0, 1, self.num_frequencies)
            init.copy_(self.theta, (first * (last / first) ** steps).expand(self.num_heads, -1))

    @property
    def decay(self) -> torch.Tensor | None:
        """lambda = -exp(lambda_hat), shape (heads,), negative, in at least float32; None without decay."""
        return None if self.lambda_hat is None else -torch.exp(at_least_float32(self.lambda_hat))

    def forward(
        self, delta_scale_factor: float = 1.0, rope_scale_factor: float = 1.0
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """lambda, (heads,), and theta, (heads, pairs), a token, in at least float32; None for what there is not.

        Args:
            delta_scale_factor, rope_scale_factor: divide lambda and theta (equally, distances and positions).
        """
        decay, theta = self.decay, self.theta
        return (
            None if decay is None else decay / delta_scale_factor,
            None if theta is None else at_least_float32(theta) / rope_scale_factor,
        )

    def frequency_response(self, omega: torch.Tensor) -> torch.Tensor:
        """Gain |y(omega)| / |x(omega)| of eq. 7, for a filter with both factors.

        Args:
            omega: angular frequencies, shape (n,), in radians a token.

        Returns:
            Shape (heads, pairs, n).

        Raises:
            ValueError: without decay or without rotary there is no pass band.
        """
        decay = self.decay
        if decay is None or self.theta is None:
            raise ValueError("the band-pass response (eq. 7) needs decay and rotary other than 'none'")
        width = -decay[:, None, None]
        centre = at_least_float32(self.theta)[:, :, None]
        return 1 / (width * torch.sqrt(1 + ((omega - centre) / width) ** 2))


def rotate_pairs(hidden_states: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """x cos(phase) + R(x) sin(phase), where R maps each pair of channels (x0, x1) to (-x1, x0).

    With one phase a pair this is a rotation; the release gives the two channels of a pair phases of their own.

    Args:
        hidden_states: (..., channels), an even number.
        phase: broadcastable to `hidden_states`, in radians, at least float32.

    Returns:
        The shape and dtype of `hidden_states`.
    """
    turned = torch.stack((-hidden_states[..., 1::2], hidden_states[..., 0::2]), dim=-1).flatten(-2)
    return (hidden_states * phase.cos() + turned * phase.sin()).to(hidden_states.dtype)
