"""The attention core against plain `scaled_dot_product_attention`: forward, and forward + backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.models import FILTERS, AttentionCore, PlainCore, random_heads
from benchmarks.races import Comparison, Contestant, Race
from benchmarks.setting import Setting

CAUSAL, BIDIRECTIONAL = "causal SDPA", "bidirectional SDPA"
_INITIAL, *_FURTHER = (f"De-focus, {name}" for name in FILTERS)


def attention_races(setting: Setting) -> list[Race]:
    """Two races a length. The core's time includes rotation and decay; gradients are of q, k, v, lambda and theta."""
    batch, heads, channels = setting.sizes.core
    races = []
    for backward in (False, True):
        for length in setting.sizes.core_lengths:
            races.append(
                Race(
                    f"attention core {batch} x {heads} x {length} x {channels}, "
                    f"{'forward + backward' if backward else 'forward'}",
                    _builder(setting, length, backward),
                    _comparisons(length, backward),
                    {"batch": batch, "heads": heads, "tokens": length, "channels": channels},
                )
            )
    return races


def _comparisons(length: int, backward: bool) -> list[Comparison]:
    """The claims are about the filter that a new model has; the others are shown beside it."""
    causal = "attention_backward" if backward else "attention_long" if length >= 577 else "attention_short"
    bidirectional = "attention_bidirectional" if length >= 1025 and not backward else None
    claims = [Comparison(_INITIAL, CAUSAL, causal), Comparison(_INITIAL, BIDIRECTIONAL, bidirectional)]
    return claims + [Comparison(name, CAUSAL) for name in _FURTHER]


def _builder(setting: Setting, length: int, backward: bool) -> Callable[[], Sequence[Contestant]]:
    def build() -> Sequence[Contestant]:
        cores: dict[str, nn.Module] = {
            f"De-focus, {name}": AttentionCore(setting, lambda_hat_range) for name, lambda_hat_range in FILTERS.items()
        }
        cores |= {CAUSAL: PlainCore(True), BIDIRECTIONAL: PlainCore(False)}
        return [core_contestant(setting, name, core, length, backward) for name, core in cores.items()]

    return build


def core_contestant(setting: Setting, name: str, core: nn.Module, length: int, backward: bool) -> Contestant:
    """One core at one length of the attention benchmark; forward passes are points of the figure."""
    heads = random_heads(setting, setting.sizes.core[0], length)
    run = core_backward(core, heads) if backward else core_forward(core, heads)
    return Contestant(name, setting.stopwatch.timed(run), curve=None if backward else name, length=length)


def core_forward(core: nn.Module, heads: Sequence[torch.Tensor]) -> Callable[[], object]:
    """A forward pass without gradients."""

    @torch.no_grad()
    def run() -> object:
        return core(*heads)

    return run


def core_backward(core: nn.Module, heads: Sequence[torch.Tensor]) -> Callable[[], object]:
    """A forward pass, and the gradients of queries, keys, values and the core's parameters."""
    inputs = [tensor.detach().requires_grad_() for tensor in heads]
    wanted = [*inputs, *core.parameters()]
    gradient = torch.randn(heads[2].transpose(1, 2).shape, device=heads[2].device, dtype=heads[2].dtype)
    gradient = gradient.transpose(1, 2)  # as the last projection returns it

    def run() -> object:
        return torch.autograd.grad(core(*inputs), wanted, gradient)

    return run
