"""Token mixers under one contract: `forward(hidden_states, state=None) -> (output, state)`.

The same function can be computed in parallel (the whole sequence at once), chunked (the sequence in pieces, the state
carried between them) or recurrently (pieces of one token). `state=None` starts a sequence. A new mixer is a class with
this contract and an entry in `MIXERS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .attention_core_defocus import attention_weights, defocus_attention
from .bandpass_defocus import DefocusBandPass, register, rotate_pairs
from .bounded_attention_defocus import DefocusBoundedAttentionState, bounded_attention
from .configuration_defocus import DefocusVisionConfig
from .kernels_defocus import at_least_float32, group_rms_norm
from .retention_core_defocus import rotated_retention
from .scan_core_defocus import causal_convolution, selective_scan
from .scan_formula_defocus import ScanOptions

_GROUP_NORM_EPS = 1e-6


@dataclass
class DefocusAttentionState:
    """What causal attention carries between pieces of a sequence.

    Attributes:
        key: keys of all tokens so far, not rotated, (batch, heads, tokens, channels of a head).
        value: their values, same shape.
    """

    key: torch.Tensor
    value: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.key.shape[2]


@dataclass
class DefocusRetentionState:
    """What retention carries: constant in size.

    Attributes:
        memory: decayed sum of the keys' and values' outer products, (batch, heads, channels, channels).
        num_tokens: tokens so far.
    """

    memory: torch.Tensor
    num_tokens: int


@dataclass
class DefocusMambaState:
    """What mamba carries: constant in size.

    Attributes:
        convolution: the last inputs of the convolution, (batch, channels, conv_kernel - 1).
        scan: the states after the last token, (batch, channels, states).
        num_tokens: tokens so far.
    """

    convolution: torch.Tensor
    scan: torch.Tensor
    num_tokens: int


class _HeadMixer(nn.Module):
    """What attention and retention share: heads, positions and the band-pass filter of each head."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__()
        assert config.decay is not None  # the configuration has resolved it
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.band_pass = DefocusBandPass(self.num_heads, self.head_dim // 2, config.decay, config.rotary)

    def start_state(self, attention_window: int | None) -> Any:
        """The state before the first token, for a stream; None, the start of every sequence, where nothing is bounded.

        Args:
            attention_window: how many last tokens attention is to keep exactly, see `DefocusVisionCache`.

        Raises:
            ValueError: this mixer cannot bound its state.
        """
        return None

    def split_heads(self, hidden_states: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """(batch, tokens, parts x hidden) to `parts` tensors (batch, heads, tokens, channels of a head)."""
        batch, num_tokens, _ = hidden_states.shape
        split = hidden_states.view(batch, num_tokens, parts, self.num_heads, self.head_dim)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def rates(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """lambda, (heads,), and theta, (heads, pairs), a token, scaled to the resolution."""
        return self.band_pass(self.config.delta_scale_factor, self.config.rope_scale_factor)


class DefocusAttentionWeights(nn.Module):
    """Computes the weights of attention where somebody asks for them; Transformers records what it returns."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, *args: Any) -> torch.Tensor:
        """See `attention_weights`."""
        return attention_weights(query, key, *args)


class DefocusAttention(_HeadMixer):
    """De-focus ViT's mixer: multi-head attention with a learnable band-pass filter on the logits (eq. 8)."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__(config)
        self.causal = config.causal
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.weights = DefocusAttentionWeights()

    def start_state(self, attention_window: int | None) -> DefocusBoundedAttentionState | None:
        """What starts a sequence: None, or with a window (in tokens) a state that stays of a constant size."""
        if attention_window is None:
            return None
        if not self.causal:
            raise ValueError("non-causal attention has no state: give it the whole sequence at once")
        return DefocusBoundedAttentionState(attention_window)

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: DefocusAttentionState | DefocusBoundedAttentionState | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, DefocusAttentionState | DefocusBoundedAttentionState]:
        """Mix tokens.

        Args:
            hidden_states: (batch, tokens, hidden): the whole sequence, or its next piece.
            state: what the previous piece returned; None starts a sequence, and so does `start_state`.
            output_attentions: go through the table of all weights, which `DefocusAttentionWeights` shows.

        Returns:
            The mixed tokens, same shape, and the state after them.

        Raises:
            ValueError: a state is given although attention is not causal, or weights are asked of a bounded one.
        """
        if state is not None and not self.causal:
            raise ValueError("non-causal attention has no state: give it the whole sequence at once")
        batch, num_tokens, hidden_size = hidden_states.shape
        query, key, value = self.split_heads(self.qkv(hidden_states), 3)
        decay, theta = self.rates()
        after: DefocusAttentionState | DefocusBoundedAttentionState
        if isinstance(state, DefocusBoundedAttentionState):
            if output_attentions:
                raise ValueError("output_attentions: attention with a window keeps no weights of the tokens before it")
            mixed, after = bounded_attention(query, key, value, decay, theta, self.scaling, state)
        else:
            if state is not None:
                key, value = torch.cat((state.key, key), dim=2), torch.cat((state.value, value), dim=2)
            if output_attentions:
                mixed = self.weights(query, key, decay, theta, self.scaling, self.causal) @ value
            else:
                mixed = defocus_attention(query, key, value, decay, theta, self.scaling, self.causal)
            after = DefocusAttentionState(key, value)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, num_tokens, hidden_size)), after


class DefocusRetention(_HeadMixer):
    """De-focus RetNet's mixer: eq. 4 with learnable lambda and theta, then a norm of each head and a gate.

    The paper does not describe the block around eq. 4. This one is RetNet's (norm of each head, SiLU gate) with values
    as wide as keys: with it a plain RetNet-Base has the 93.6 M parameters that the release reports.
    """

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, state: DefocusRetentionState | None = None
    ) -> tuple[torch.Tensor, DefocusRetentionState]:
        """Mix tokens.

        Args:
            hidden_states: (batch, tokens, hidden): the whole sequence, or its next piece.
            state: what the previous piece returned; None starts a sequence.

        Returns:
            The mixed tokens, same shape, and the state after them.
        """
        num_tokens = hidden_states.shape[1]
        past = 0 if state is None else state.num_tokens
        query, key, value = self.split_heads(self.qkv(hidden_states), 3)
        decay, theta = self.rates()
        memory = None if state is None else state.memory
        mixed, memory = rotated_retention(query, key, value, decay, theta, self.scaling, memory, past)
        mixed = group_rms_norm(mixed, self.head_dim, _GROUP_NORM_EPS).transpose(1, 2).flatten(2)
        output = self.out_proj(mixed.to(hidden_states.dtype) * F.silu(self.gate(hidden_states)))
        return output, DefocusRetentionState(memory, past + num_tokens)


# Range and floor of the initial time steps (classification/utils/config.py of the release).
_TIME_STEP_RANGE = (0.001, 0.1)
_TIME_STEP_FLOOR = 1e-4


class DefocusConvolution(nn.Conv1d):
    """The causal convolution before the scan.

    Its weights are used by a call of the module, never read from outside: what holds them elsewhere until they are
    needed (offloading, sharding) brings them for a call.
    """

    def forward(self, inputs: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:  # type: ignore[override]
        """See `causal_convolution`."""
        return causal_convolution(inputs, before, self.weight, self.bias)


class DefocusMamba(nn.Module):
    """De-focus Mamba's mixer (eq. 9), as released in `mamba_block.py`.

    Projection to inputs and gates, causal convolution, selective scan with learnable rotary frequencies on B and C
    (one per state), group RMS norm, skip, gate, projection. `decay` other than "data_dependent" gives the decay a time
    step per channel that does not depend on the token ("learnable", "fixed"), or leaves it out ("none").
    """

    D: torch.Tensor
    A_log: torch.Tensor | None
    theta: torch.Tensor | None
    decay_bias: torch.Tensor | None

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__()
        assert config.decay is not None  # the configuration has resolved it
        self.config = config
        channels, states = config.intermediate_size, config.state_size
        decay = "learnable" if config.decay == "data_dependent" else config.decay
        register(self, "A_log", decay, channels, states)
        register(self, "D", "learnable", channels)
        register(self, "theta", config.rotary, states)
        register(self, "decay_bias", "none" if config.decay == "data_dependent" else decay, channels)
        self.conv1d = DefocusConvolution(channels, channels, config.conv_kernel, groups=channels)
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=False)
        self.x_proj = nn.Linear(channels, config.time_step_rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(config.time_step_rank, channels)
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the release's initial values of everything but the projections `in_proj`, `x_proj` and `out_proj`."""
        config = self.config
        states, channels = config.state_size, config.intermediate_size
        if self.A_log is not None:
            init.copy_(self.A_log, torch.arange(1, states + 1).float().log().expand(channels, -1))
        init.ones_(self.D)
        if self.theta is not None:
            powers = 100.0 ** (-torch.arange(1, states + 1) / states)
            init.copy_(self.theta, (powers - 0.01) / (1 - 0.01))
        bound = config.time_step_rank**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        # Deterministic: the channels are ordered by their time scale.
        first, last = _TIME_STEP_RANGE
        step = torch.exp(torch.linspace(math.log(first), math.log(last), channels))
        step = step.clamp(min=_TIME_STEP_FLOOR)
        inverse_softplus = step + torch.log(-torch.expm1(-step))
        for bias in (self.dt_proj.bias, self.decay_bias):
            if bias is not None:
                init.copy_(bias, inverse_softplus)
        bound = config.conv_kernel**-0.5  # PyTorch's default
        init.uniform_(self.conv1d.weight, -bound, bound)
        if self.conv1d.bias is not None:
            init.uniform_(self.conv1d.bias, -bound, bound)

    def start_state(self, attention_window: int | None) -> Any:
        """See `_HeadMixer.start_state`; the state is constant in size, whatever the window."""
        return None

    def forward(
        self, hidden_states: torch.Tensor, state: DefocusMambaState | None = None
    ) -> tuple[torch.Tensor, DefocusMambaState]:
        """Mix tokens.

        Args:
            hidden_states: (batch, tokens, hidden): the whole sequence, or its next piece.
            state: what the previous piece returned; None starts a sequence.

        Returns:
            The mixed tokens, same shape, and the state after them.
        """
        past = 0 if state is None else state.num_tokens
        inputs, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        before = None if state is None else state.convolution
        window = self._next_window(inputs, before)
        inputs = self.conv1d(inputs, before)
        mixed, scan = self._scan(inputs, gate, past, None if state is None else state.scan)
        output = self.out_proj(mixed.to(hidden_states.dtype))
        return output, DefocusMambaState(window, scan, past + hidden_states.shape[1])

    def _next_window(self, inputs: torch.Tensor, window: torch.Tensor | None) -> torch.Tensor:
        """The last inputs of the convolution, for the next piece; a copy, which does not keep all of them alive."""
        width = self.config.conv_kernel - 1
        last = inputs[:, max(0, inputs.shape[1] - width) :].transpose(1, 2)
        if window is None:
            return F.pad(last, (width - last.shape[-1], 0))
        return torch.cat((window[..., last.shape[-1] :], last), dim=-1)

    def _scan(
        self, inputs: torch.Tensor, gate: torch.Tensor, past: int, initial: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        delta, B_and_C = self.x_proj(inputs).split((config.time_step_rank, 2 * config.state_size), dim=-1)
        decay_delta = None
        if self.decay_bias is not None:
            decay_delta = F.softplus(at_least_float32(self.decay_bias)) / config.delta_scale_factor
        A = None if self.A_log is None else -torch.exp(at_least_float32(self.A_log))
        B_and_C = at_least_float32(B_and_C).unflatten(-1, (2, -1))
        if self.theta is not None:
            theta = at_least_float32(self.theta)
            positions = torch.arange(past, past + inputs.shape[1], device=inputs.device, dtype=theta.dtype)
            B_and_C = rotate_pairs(B_and_C, (positions / config.rope_scale_factor)[:, None, None] * theta)
        B, C = B_and_C.unbind(-2)
        options = ScanOptions(True, 1 / config.delta_scale_factor, config.group_norm_size, _GROUP_NORM_EPS)
        return selective_scan(inputs, self.dt_proj(delta), decay_delta, A, B, C, initial, self.D, gate, options)


MIXERS: dict[str, type[nn.Module]] = {
    "attention": DefocusAttention,
    "retention": DefocusRetention,
    "mamba": DefocusMamba,
}
