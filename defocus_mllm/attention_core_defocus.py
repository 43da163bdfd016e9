"""The core of De-focus attention (eq. 8): rotary positions and a decay that multiplies the logits.

The decay MULTIPLIES the logit before the softmax: a distant logit goes to 0, that is towards uniform attention. It is
not an additive bias, which would suppress distant tokens instead. Backends of this one function:

- `reference`: the table of all pairs of tokens.
- `folded`: decay and rotation become factors of queries and keys (`fold_defocus`), and plain
  `scaled_dot_product_attention` does the rest. For heads whose factors stay in the range of the dtype.
- `windowed`: a strongly decaying head sees a window sharply and everything before it uniformly (`window_defocus`);
  linear in the length. Where the window is provably sharp to the last digit.
- `flex`: FlexAttention with the decay as score function; for GPUs.

On a CPU each head gets `folded` or `windowed`, whichever is safe and cheaper, and `reference` if neither is.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .fold_defocus import fold, fold_images, folds_any, folds_safely, images_at_once, largest_norm
from .kernels_defocus import at_least_float32, forced_backend, report_backend
from .opaque_defocus import opaque_operator
from .window_defocus import BLOCK_EXPONENT, smallest_window, windowed_attention

# Measured on two cores (docs/results/speed.md): below this length, or with a wider window, plain attention is cheaper.
_WINDOWED_FROM_TOKENS = 1024
_WINDOWED_UP_TO_SHARE = 1 / 12
_SMALLEST_BLOCK = 32


@dataclass
class _Group:
    """Heads that share a backend, and the window of `windowed`."""

    backend: str
    heads: list[int]
    window: int = 0

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The part of `tensor` that belongs to these heads; a view if they are neighbours."""
        first, count = self.heads[0], len(self.heads)
        if count == tensor.shape[dim]:
            return tensor
        if self.heads == list(range(first, first + count)):
            return tensor.narrow(dim, first, count)
        return tensor.index_select(dim, torch.tensor(self.heads, device=tensor.device))


def defocus_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    theta: torch.Tensor | None,
    scaling: float,
    causal: bool = True,
) -> torch.Tensor:
    """De-focus attention (eq. 8) of the last tokens of a sequence.

    Args:
        query: not yet rotated, (batch, heads, queries, channels); of the last tokens of the sequence.
        key, value: of the whole sequence, keys not yet rotated, (batch, heads, keys, channels).
        decay: lambda, negative, (heads,), in tokens^-1; None for no decay.
        theta: rotary frequencies, (heads, channels / 2), in radians a token; None for no rotation.
        scaling: factor on the logits, 1 / sqrt(channels).
        causal: a query sees the keys up to its own token; else all keys, with the decay e^{lambda |t-s|}.

    Returns:
        (batch, heads, queries, channels), in the dtype of `query`.

    Raises:
        ValueError: `DEFOCUS_KERNEL` names no backend.
        RuntimeError: it forces one that is not safe for these tensors.
    """
    if torch.compiler.is_compiling() and query.device.type == "cpu":
        return _traced(query, key, value, decay, theta, scaling, causal)
    return _attend(query, key, value, decay, theta, scaling, causal)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    theta: torch.Tensor | None,
    scaling: float,
    causal: bool,
) -> torch.Tensor:
    with torch.autocast(query.device.type, enabled=False):
        groups = _plan(query.detach(), key.detach(), decay, scaling, causal)
        if len(groups) == 1:
            return _run(groups[0], query, key, value, decay, theta, scaling, causal)
        # Tokens before heads in memory, as the projection after this reads them.
        if _differentiable(query, key, value, decay, theta):
            outputs = [_run(group, query, key, value, decay, theta, scaling, causal) for group in groups]
            output = torch.cat([output.transpose(1, 2) for output in outputs], dim=2).transpose(1, 2)
        else:
            output = query.new_empty(*(query.shape[dim] for dim in (0, 2, 1, 3))).transpose(1, 2)
            parts = output.split([len(group.heads) for group in groups], dim=1)
            for group, part in zip(groups, parts, strict=True):
                _run(group, query, key, value, decay, theta, scaling, causal, part)
        order = [head for group in groups for head in group.heads]
        if order == sorted(order):
            return output
        return output[:, torch.tensor(order, device=query.device).argsort()]


def _differentiable(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _run(
    group: _Group,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    theta: torch.Tensor | None,
    scaling: float,
    causal: bool,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output of a group of heads; without gradients it may be written to `output`."""
    report_backend("attention", group.backend)
    dtype = query.dtype
    query, key, value = (group.of(tensor, 1) for tensor in (query, key, value))
    decay, theta = (None if tensor is None else group.of(tensor, 0) for tensor in (decay, theta))
    if group.backend == "windowed":
        assert decay is not None
        result = windowed_attention(query, key, value, decay, theta, scaling, group.window)
    elif group.backend == "folded":
        result = _folded(query, key, value, decay, theta, scaling, causal, output)
    else:
        result = _BACKENDS[group.backend](query, key, value, decay, theta, scaling, causal)
    if output is None:
        return result.to(dtype)
    return output if result is output else output.copy_(result)


_traced = opaque_operator(
    "attention",
    "Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? theta, float scaling, bool causal",
    _attend,
)


def _plan(
    query: torch.Tensor, key: torch.Tensor, decay: torch.Tensor | None, scaling: float, causal: bool
) -> list[_Group]:
    """Which heads run on which backend."""
    everything = list(range(query.shape[1]))
    forced = forced_backend("attention")
    if forced == "flex" and query.device.type == "cpu" and torch.is_grad_enabled():
        raise RuntimeError("DEFOCUS_KERNEL=flex: FlexAttention has no backward pass on the CPU")
    if forced in ("reference", "flex") or query.device.type not in ("cpu", "cuda"):
        return [_Group(forced or "reference", everything)]
    if decay is None:
        if forced == "windowed":
            raise RuntimeError("DEFOCUS_KERNEL=windowed: heads without decay have no window")
        return [_Group("folded", everything)]
    if query.device.type == "cuda" and forced is None:
        return [_Group("flex", everything)]
    if not causal:
        if forced is not None:
            raise RuntimeError(
                f"DEFOCUS_KERNEL={forced}: e^{{lambda |t-s|}} of non-causal attention does not factorise"
            )
        return [_Group("reference", everything)]
    choices = _choose(query, key, decay.detach().tolist(), scaling, forced)
    return _grouped(choices)


def _choose(
    query: torch.Tensor, key: torch.Tensor, rates: list[float], scaling: float, forced: str | None
) -> list[tuple[str, float, int]]:
    """(backend, rate, window) of every head of causal attention."""
    queries, keys, channels = query.shape[2], key.shape[2], query.shape[3]
    # The CPU's causal kernel fills in what it masks; a mask given as a tensor is added.
    masked_by_adding = query.device.type != "cpu" or queries != keys
    choices = []
    for head, rate in enumerate(rates):
        # Most heads need no look at the numbers.
        surely = queries == keys < _WINDOWED_FROM_TOKENS and folds_any(rate, queries, query.dtype)
        if surely and forced is None:
            choices.append(("folded", rate, 0))
            continue
        norms = largest_norm(query[:, head]), largest_norm(key[:, head])
        folds = folds_safely(rate, queries, keys, norms, channels, query.dtype, masked_by_adding)
        sharp = smallest_window(rate, norms, scaling, query.dtype) if queries == keys else math.inf
        windows = sharp < queries and -rate * sharp <= BLOCK_EXPONENT
        cheaper = queries >= _WINDOWED_FROM_TOKENS and sharp <= queries * _WINDOWED_UP_TO_SHARE
        if forced == "folded" or (forced is None and folds and not (windows and cheaper)):
            backend = "folded"
        else:
            backend = "windowed" if windows or forced == "windowed" else "reference"
        if (backend == "folded" and not folds) or (backend == "windowed" and not windows):
            raise RuntimeError(
                f"DEFOCUS_KERNEL={forced}: not safe for head {head} with decay {rate:.3g}, {queries} queries, {keys} "
                f"keys, norms {norms[0]:.3g} and {norms[1]:.3g} in {query.dtype}"
            )
        choices.append((backend, rate, int(sharp) if backend == "windowed" else 0))
    return choices


def _grouped(choices: list[tuple[str, float, int]]) -> list[_Group]:
    """Heads of one backend together; windowed heads share a block while every factor of it stays in range."""
    groups = [
        _Group(backend, heads)
        for backend in ("folded", "reference")
        if (heads := [head for head, choice in enumerate(choices) if choice[0] == backend])
    ]
    windowed = [(window, rate, head) for head, (backend, rate, window) in enumerate(choices) if backend == "windowed"]
    current: _Group | None = None
    for window, rate, head in sorted(windowed, reverse=True):
        if current is None or -rate * current.window > BLOCK_EXPONENT:
            current = _Group("windowed", [], max(window, min(_SMALLEST_BLOCK, int(BLOCK_EXPONENT / -rate))))
            groups.append(current)
        current.heads.append(head)
    for group in groups:
        group.heads.sort()
    return sorted(groups, key=lambda group: group.heads)


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    theta: torch.Tensor | None,
    scaling: float,
    causal: bool,
) -> torch.Tensor:
    """The formula as it stands, with the table of all pairs of tokens."""
    return _weights(query, key, decay, theta, scaling, causal) @ value


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    decay: torch.Tensor | None,
    theta: torch.Tensor | None,
    scaling: float,
    causal: bool = True,
) -> torch.Tensor:
    """The table by which `defocus_attention` weights the values; the arguments are the same.

    Returns:
        (batch, heads, queries, keys), each row with the sum 1, in the dtype of `query`.
    """
    with torch.autocast(query.device.type, enabled=False):
        return _weights(query, key, decay, theta, scaling, causal).to(query.dtype)


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    decay: torch.Tensor | None,
    theta: torch.Tensor | None,
    scaling: float,
    causal: bool,
) -> torch.Tensor:
    query, key = fold(query, key, None, theta)
    queries, keys, filter_dtype = query.shape[2], key.shape[2], at_least_float32(query).dtype
    distance = _distances(queries, keys, query.device)
    logits = query @ key.transpose(-1, -2) * scaling
    if decay is not None:
        logits = logits * torch.exp(decay.to(filter_dtype)[:, None, None] * distance.abs()).to(logits.dtype)
    if causal:
        logits = logits.masked_fill(distance < 0, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1)


def _distances(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """t - s, (queries, keys), in tokens; the queries are the last of the keys' tokens."""
    return torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)


def _folded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    theta: torch.Tensor | None,
    scaling: float,
    causal: bool,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain attention of folded queries and keys; without gradients it may be written to `output`."""
    if _differentiable(query, key, decay, theta):
        return _plain(*fold(query, key, decay, theta), value, scaling, causal)
    images = images_at_once(key) if output is None else 1
    if output is None and images < len(query):
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    first = 0
    for q, k in fold_images(query, key, decay, theta, images):
        result = _plain(q, k, value[first : first + len(q)], scaling, causal)
        if output is None:
            return result
        output[first : first + len(q)] = result
        first += len(q)
    assert output is not None
    return output


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool) -> torch.Tensor:
    queries, keys = query.shape[2], key.shape[2]
    square = queries == keys
    mask = _distances(queries, keys, query.device) >= 0 if causal and not square else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal and square, scale=scaling)


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    theta: torch.Tensor | None,
    scaling: float,
    causal: bool,
) -> torch.Tensor:
    """FlexAttention of rotated queries and keys; the decay is its score function, in range for any rate."""
    queries, keys = query.shape[2], key.shape[2]
    past = keys - queries
    query, key = fold(query, key, None, theta)

    def decayed(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor
    ) -> torch.Tensor:
        assert decay is not None
        return score * torch.exp(decay[h] * (t + past - s).abs())

    def visible(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return t + past >= s

    mask = create_block_mask(visible, None, None, queries, keys, device=query.device) if causal else None
    compiled = query.device.type == "cuda" and not torch.compiler.is_compiling()
    run: Any = _compiled_flex() if compiled else flex_attention
    output = run(query, key, value, score_mod=None if decay is None else decayed, block_mask=mask, scale=scaling)
    assert isinstance(output, torch.Tensor)
    return output


@functools.cache
def _compiled_flex() -> Any:
    """Made on first use: the mere call of `torch.compile` imports Inductor, most of a second in every process."""
    return torch.compile(flex_attention)


_BACKENDS = {"reference": _reference, "flex": _flex}
