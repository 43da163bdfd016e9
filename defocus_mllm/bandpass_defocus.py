"""The learnable band-pass filter of De-focus attention: decay and rotary frequencies.

A token at distance t - s is weighted by e^{lambda (t-s)} e^{i theta (t-s)} (paper, eqs. 4, 7 and 8): lambda < 0 sets
the width of the pass band, theta its centre. lambda = -exp(lambda_hat) keeps the sign during training.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

# The paper does not publish initial values for De-focus ViT. These cover distances from about 3 tokens
# (lambda = -e^-1) to 150 tokens (lambda = -e^-5) over the heads, and wave lengths from 6 to 628 tokens.
LAMBDA_HAT_RANGE = (-5.0, -1.0)
THETA_RANGE = (1.0, 0.01)


class DefocusBandPass(nn.Module):
    """Decay `lambda` (one per head) and frequencies `theta` (one per head and pair of channels).

    Args:
        num_heads: number of heads.
        num_frequencies: pairs of channels in a head.
        decay, rotary: "learnable", "fixed" (kept at the initial values) or "none" (no such factor).
    """

    def __init__(self, num_heads: int, num_frequencies: int, decay: str, rotary: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_frequencies = num_frequencies
        self.lambda_hat = None if decay == "none" else nn.Parameter(torch.empty(num_heads), decay == "learnable")
        self.theta = (
            None if rotary == "none" else nn.Parameter(torch.empty(num_heads, num_frequencies), rotary == "learnable")
        )
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
        """lambda = -exp(lambda_hat), shape (heads,), negative; None without decay."""
        return None if self.lambda_hat is None else -torch.exp(self.lambda_hat)

    def decay_factor(self, distance: torch.Tensor) -> torch.Tensor | None:
        """Return e^{lambda |distance|}.

        Args:
            distance: t - s, shape (queries, keys), in tokens.

        Returns:
            Shape (heads, queries, keys), in at least float32; None without decay.
        """
        if self.lambda_hat is None:
            return None
        decay = -torch.exp(_at_least_float32(self.lambda_hat))
        return torch.exp(decay[:, None, None] * distance.abs().to(decay.dtype))

    def rotate(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Multiply the pairs of channels (2k, 2k+1) by e^{i theta_k position}; phases are never below float32.

        Args:
            hidden_states: (batch, heads, tokens, channels of a head).
            positions: (tokens,), in tokens.
        """
        if self.theta is None:
            return hidden_states
        theta = _at_least_float32(self.theta)
        phase = positions.to(theta.dtype)[:, None] * theta[:, None, :]  # (heads, tokens, pairs)
        cosine, sine = phase.cos(), phase.sin()
        even, odd = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
        return rotated.flatten(-2).to(hidden_states.dtype)

    def frequency_response(self, omega: torch.Tensor) -> torch.Tensor:
        """Gain |y(omega)| / |x(omega)| of eq. 7, for a filter with both factors.

        Args:
            omega: angular frequencies, shape (n,), in radians a token.

        Returns:
            Shape (heads, pairs, n).

        Raises:
            ValueError: without decay or without rotary there is no pass band.
        """
        if self.lambda_hat is None or self.theta is None:
            raise ValueError("the band-pass response (eq. 7) needs decay and rotary other than 'none'")
        width = torch.exp(_at_least_float32(self.lambda_hat))[:, None, None]
        centre = _at_least_float32(self.theta)[:, :, None]
        return 1 / (width * torch.sqrt(1 + ((omega - centre) / width) ** 2))


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
