"""The blocks of the encoder: a token mixer and its surroundings (norms, feed-forward layer, drop path)."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_defocus import DefocusLayerState
from .configuration_defocus import DefocusVisionConfig
from .kernels_defocus import at_least_float32, group_rms_norm
from .mixers_defocus import MIXERS, DefocusAttention


class DefocusDropPath(nn.Module):
    """Stochastic depth: drops the branch of a sample with probability `rate`, and scales the others by 1/(1-rate)."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.rate
        # A comparison takes the rate as a number of the graph; drawing with it would compile the model for each rate.
        kept = torch.rand(len(branch), 1, 1, device=branch.device) < keep
        return branch * kept.to(branch.dtype).div_(keep)


class DefocusContextBroadcasting(nn.Module):
    """Adds the mean token to every token: (x + mean) / 2 ("mean"), or x + scale * mean with a learned scale ("scaled").

    In a causal encoder the mean is over the tokens so far, which at the class token is the mean over all. The scale of
    a channel starts at 0, that is at no broadcasting.
    Source: Context Broadcasting (arXiv 2210.08457), which has only the mean over all tokens; the causal one is ours.
    """

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__()
        self.causal = config.causal
        scaled = config.context_broadcasting == "scaled"
        self.scale = nn.Parameter(torch.zeros(config.hidden_size)) if scaled else None

    def forward(self, hidden_states: torch.Tensor, state: DefocusLayerState | None = None) -> torch.Tensor:
        """Broadcast to the tokens (batch, tokens, hidden) of a sequence, or of its next piece after `state`."""
        tokens = at_least_float32(hidden_states)
        if self.causal:
            past = 0 if state is None else state.num_tokens
            count = torch.arange(past + 1, past + tokens.shape[1] + 1, device=tokens.device, dtype=tokens.dtype)
            token_sum = tokens.cumsum(dim=1)
            if state is not None:
                token_sum = token_sum if state.token_sum is None else token_sum + state.token_sum
                # A view would keep the sums of all tokens in memory.
                state.token_sum = token_sum[:, -1:].clone()
            mean = token_sum / count[:, None]
        else:
            mean = tokens.mean(dim=1, keepdim=True)
        tokens = (tokens + mean) / 2 if self.scale is None else tokens + self.scale * mean
        return tokens.to(hidden_states.dtype)


class DefocusMLP(nn.Module):
    """The feed-forward layer of a block, followed by context broadcasting if the configuration has it."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.broadcast = None if config.context_broadcasting == "none" else DefocusContextBroadcasting(config)

    def forward(self, hidden_states: torch.Tensor, state: DefocusLayerState | None = None) -> torch.Tensor:
        hidden_states = self.fc2(self.activation(self.fc1(hidden_states)))
        return hidden_states if self.broadcast is None else self.broadcast(hidden_states, state)


class DefocusLayer(GradientCheckpointingLayer):
    """A pre-norm block: mixer, then feed-forward layer, each with drop path on its branch."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = MIXERS[config.mixer](config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = DefocusMLP(config)
        self.drop_path = DefocusDropPath()

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: DefocusLayerState | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute the tokens (batch, tokens, hidden) of a sequence, or of its next piece after `state`, brought on.

        With `output_attentions` attention shows its weights; other mixers have none.
        """
        options = {"output_attentions": True} if output_attentions and isinstance(self.mixer, DefocusAttention) else {}
        mixed, mixer_state = self.mixer(self.norm1(hidden_states), None if state is None else state.mixer, **options)
        hidden_states = hidden_states + self.drop_path(mixed)
        hidden_states = hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states), state))
        if state is not None:
            state.mixer = mixer_state
            state.num_tokens += hidden_states.shape[1]
        return hidden_states


class DefocusRMSNorm(nn.Module):
    """Root mean square norm with a weight, computed in at least float32; the norm before a released mamba mixer."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalised = group_rms_norm(hidden_states, hidden_states.shape[-1], self.eps)
        return self.weight * normalised.to(self.weight.dtype)


class DefocusMambaLayer(GradientCheckpointingLayer):
    """A block of De-focus Mamba, as released: pre-norm mixer, no feed-forward layer, residual in at least float32."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__()
        self.norm = DefocusRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MIXERS[config.mixer](config)
        self.drop_path = DefocusDropPath()

    def forward(
        self, hidden_states: torch.Tensor, state: DefocusLayerState | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Compute the tokens (batch, tokens, hidden) of a sequence, or of its next piece after `state`, brought on."""
        mixed, mixer_state = self.mixer(self.norm(hidden_states), None if state is None else state.mixer)
        if state is not None:
            state.mixer = mixer_state
            state.num_tokens += hidden_states.shape[1]
        return at_least_float32(hidden_states) + self.drop_path(mixed)
