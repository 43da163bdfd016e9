"""Token mixers under one contract: `forward(hidden_states, state=None) -> (output, state)`.

The same function can be computed in parallel (the whole sequence at once), chunked (the sequence in pieces, the state
carried between them) or recurrently (pieces of one token). `state=None` starts a sequence. A new mixer is a class with
this contract and an entry in `MIXERS`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .bandpass_defocus import DefocusBandPass
from .configuration_defocus import DefocusVisionConfig


@dataclass
class DefocusAttentionState:
    """What causal attention carries between pieces of a sequence.

    Attributes:
        key: rotated keys of all tokens so far, (batch, heads, tokens, channels of a head).
        value: their values, same shape.
    """

    key: torch.Tensor
    value: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.key.shape[2]


def defocus_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay_factor: torch.Tensor | None,
    visible: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """De-focus attention (eq. 8), the plain reference.

    The decay MULTIPLIES the logit before the softmax: a distant logit goes to 0, that is towards uniform attention. It
    is not an additive bias, which would suppress distant tokens instead.

    Args:
        query: rotated queries, (batch, heads, queries, channels).
        key, value: rotated keys and values, (batch, heads, keys, channels).
        decay_factor: e^{lambda |t-s|}, (heads, queries, keys), or None.
        visible: True where the query may see the key, (queries, keys), or None for all.
        scaling: factor on the logits, 1 / sqrt(channels).

    Returns:
        (batch, heads, queries, channels).
    """
    logits = query @ key.transpose(-1, -2)
    # The constants are folded into the (small) decay table: one pass over the logits instead of two.
    logits = logits * (scaling if decay_factor is None else (decay_factor * scaling).to(logits.dtype))
    if visible is not None:
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1) @ value


class DefocusAttention(nn.Module):
    """De-focus ViT's mixer: multi-head attention with a learnable band-pass filter on the logits (eq. 8)."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__()
        self.causal = config.causal
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.band_pass = DefocusBandPass(self.num_heads, self.head_dim // 2, config.decay, config.rotary)

    def forward(
        self, hidden_states: torch.Tensor, state: DefocusAttentionState | None = None
    ) -> tuple[torch.Tensor, DefocusAttentionState]:
        """Mix tokens.

        Args:
            hidden_states: (batch, tokens, hidden): the whole sequence, or its next piece.
            state: what the previous piece returned; None starts a sequence.

        Returns:
            The mixed tokens, same shape, and the state after them.

        Raises:
            ValueError: a state is given although attention is not causal.
        """
        if state is not None and not self.causal:
            raise ValueError("non-causal attention has no state: give it the whole sequence at once")
        batch, num_tokens, hidden_size = hidden_states.shape
        past = 0 if state is None else state.num_tokens
        positions = torch.arange(past, past + num_tokens, device=hidden_states.device)
        projected = self.qkv(hidden_states).view(batch, num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.band_pass.rotate(query, positions), self.band_pass.rotate(key, positions)
        if state is not None:
            key, value = torch.cat((state.key, key), dim=2), torch.cat((state.value, value), dim=2)

        distance = positions[:, None] - torch.arange(past + num_tokens, device=hidden_states.device)
        visible = distance >= 0 if self.causal else None
        mixed = defocus_attention(query, key, value, self.band_pass.decay_factor(distance), visible, self.scaling)
        output = self.out_proj(mixed.transpose(1, 2).reshape(batch, num_tokens, hidden_size))
        return output, DefocusAttentionState(key, value)


MIXERS: dict[str, type[nn.Module]] = {"attention": DefocusAttention}
