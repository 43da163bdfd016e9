"""Random checkpoints in the released layout, and what the released network computes from them, written a second time.

Written from papers.md A2, in float64, token by token, with none of the package's code: names, order of operations and
layout of the projections are stated here once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a small network; `two_heads`, `mlp`, `class_token`, `positions`, `rotary`, `sections` choose its parts."""

    hidden: int = 24
    depth: int = 2
    inner: int = 48
    states: int = 6
    rank: int = 5
    kernel: int = 3
    patch: int = 4
    channels: int = 3
    image: int = 16
    classes: int = 7
    group_norm: int = 16
    delta_scale: float = 1.0
    rope_scale: float = 1.0
    norm_eps: float = 1e-5
    two_heads: bool = True
    mlp: bool = False
    class_token: bool = True
    positions: bool = False
    rotary: bool = True
    sections: bool = False

    def but(self, **changes: Any) -> Sizes:
        return replace(self, **changes)


def release_config(sizes: Sizes, node: type = dict) -> Any:
    """The parts of the release's configuration that matter, made of `node`."""
    mamba = {"delta_scale_factor": sizes.delta_scale, "rope_scale_factor": sizes.rope_scale}
    mamba |= {"group_norm_size": sizes.group_norm, "layer_norm_epsilon": sizes.norm_eps}
    model = {"patch_embed_change_res": sizes.sections, "MAMBA": node(mamba)}
    return node({"DATA": node({"IMG_SIZE": sizes.image}), "MODEL": node(model)})


def random_state_dict(sizes: Sizes, seed: int = 0) -> Tensors:
    """Weights wide enough that no part of the network is near its identity."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    hidden, inner, states = sizes.hidden, sizes.inner, sizes.states
    tensors: Tensors = {}
    if sizes.class_token:
        tensors["cls_token"] = draw(1, 1, hidden)
    if sizes.positions:
        tensors["pos_embed"] = draw(1, (sizes.image // sizes.patch) ** 2, hidden)
    tensors["patch_embed.proj.weight"] = draw(hidden, sizes.channels, sizes.patch, sizes.patch)
    tensors["patch_embed.proj.bias"] = draw(hidden)
    for index in range(sizes.depth):
        block = f"blocks.{index}"
        tensors[f"{block}.norm.weight"] = 1 + draw(hidden)
        tensors[f"{block}.mixer.A_log"] = draw(inner, states, std=1.0)
        tensors[f"{block}.mixer.D"] = 1 + draw(inner)
        if sizes.rotary:
            tensors[f"{block}.mixer.freq"] = torch.rand(states, generator=generator)
        tensors[f"{block}.mixer.conv1d.weight"] = draw(inner, 1, sizes.kernel)
        tensors[f"{block}.mixer.conv1d.bias"] = draw(inner)
        tensors[f"{block}.mixer.in_proj.weight"] = draw(2 * inner, hidden)
        tensors[f"{block}.mixer.x_proj.weight"] = draw(sizes.rank + 2 * states, inner)
        tensors[f"{block}.mixer.dt_proj.weight"] = draw(inner, sizes.rank)
        tensors[f"{block}.mixer.dt_proj.bias"] = draw(inner) - 2
        tensors[f"{block}.mixer.out_proj.weight"] = draw(hidden, inner)
    tensors["norm.weight"], tensors["norm.bias"] = 1 + draw(hidden), draw(hidden)
    for head in ("head", "head2")[: 1 + sizes.two_heads]:
        if sizes.mlp:
            tensors[f"{head}.0.weight"], tensors[f"{head}.0.bias"] = draw(3 * hidden, hidden), draw(3 * hidden)
            tensors[f"{head}.2.weight"] = draw(sizes.classes, 3 * hidden)
            tensors[f"{head}.2.bias"] = draw(sizes.classes)
        else:
            tensors[f"{head}.weight"], tensors[f"{head}.bias"] = draw(sizes.classes, hidden), draw(sizes.classes)
    return tensors


def forward(tensors: Tensors, sizes: Sizes, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the released network gives for (batch, channels, image, image) pixels, in float64.

    Returns the residual stream after every block ("block_0", ...), the normed tokens ("last_hidden_state"), the main
    head's "logits" (batch, classes) and, with two heads, the "aux_logits" of every patch.
    """
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = _embed(w, sizes, pixels.double())
    results: dict[str, torch.Tensor] = {}
    for index in range(sizes.depth):
        block = {name[len(f"blocks.{index}.") :]: t for name, t in w.items() if name.startswith(f"blocks.{index}.")}
        normed = x / torch.sqrt((x**2).mean(-1, keepdim=True) + sizes.norm_eps) * block["norm.weight"]
        x = x + torch.stack([_mix(block, sizes, sequence) for sequence in normed])
        results[f"block_{index}"] = x
    centred = x - x.mean(-1, keepdim=True)
    x = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * w["norm.weight"] + w["norm.bias"]
    results["last_hidden_state"] = x
    results["logits"] = _head(w, "head", x[:, -1] if sizes.class_token else x.mean(1))
    if sizes.two_heads:
        results["aux_logits"] = _head(w, "head2", x[:, :-1])
    return results


def _embed(w: Tensors, sizes: Sizes, pixels: torch.Tensor) -> torch.Tensor:
    """Patches, in raster order or as two by two sections; positions in the order of the sequence; class token last."""
    side, p = sizes.image // sizes.patch, sizes.patch
    places = [(y, x) for y in range(side) for x in range(side)]
    if sizes.sections:
        half = side // 2
        places.sort(key=lambda place: (place[0] // half, place[1] // half, place[0] % half, place[1] % half))
    tokens = []
    for y, x in places:
        patch = pixels[:, :, y * p : (y + 1) * p, x * p : (x + 1) * p]
        tokens.append(torch.einsum("bcyx,hcyx->bh", patch, w["patch_embed.proj.weight"]) + w["patch_embed.proj.bias"])
    sequence = torch.stack(tokens, dim=1)
    if sizes.positions:
        sequence = sequence + w["pos_embed"]
    if sizes.class_token:
        sequence = torch.cat([sequence, w["cls_token"].expand(len(sequence), 1, -1)], dim=1)
    return sequence


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def _rotate(x: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """x cos + R(x) sin, R: (x0, x1, x2, x3, ...) -> (-x1, x0, -x3, x2, ...)."""
    turned = torch.empty_like(x)
    turned[0::2], turned[1::2] = -x[1::2], x[0::2]
    return x * torch.cos(phase) + turned * torch.sin(phase)


def _mix(block: Tensors, sizes: Sizes, sequence: torch.Tensor) -> torch.Tensor:
    """One mixer on one sequence (tokens, hidden), one token after the other."""
    inner, states, rank = sizes.inner, sizes.states, sizes.rank
    u, z = (sequence @ block["mixer.in_proj.weight"].T).split(inner, dim=1)
    A = -torch.exp(block["mixer.A_log"])
    h = torch.zeros(inner, states, dtype=torch.float64)
    outputs = []
    for n in range(len(sequence)):
        convolved = block["mixer.conv1d.bias"].clone()
        for k in range(sizes.kernel):
            source = n - (sizes.kernel - 1) + k
            if source >= 0:
                convolved = convolved + block["mixer.conv1d.weight"][:, 0, k] * u[source]
        x = _silu(convolved)
        dt, B, C = (block["mixer.x_proj.weight"] @ x).split([rank, states, states])
        if sizes.rotary:
            phase = n / sizes.rope_scale * block["mixer.freq"]
            B, C = _rotate(B, phase), _rotate(C, phase)
        delta = torch.log1p(torch.exp(block["mixer.dt_proj.weight"] @ dt + block["mixer.dt_proj.bias"]))
        delta = (delta / sizes.delta_scale)[:, None]
        h = torch.exp(delta * A) * h + delta * B * x[:, None]
        y = h @ C
        if sizes.group_norm:
            groups = y.view(-1, sizes.group_norm)
            y = (groups / torch.sqrt((groups**2).mean(1, keepdim=True) + 1e-6)).flatten()
        y = (y + block["mixer.D"] * x) * _silu(z[n])
        outputs.append(block["mixer.out_proj.weight"] @ y)
    return torch.stack(outputs)


def _head(w: Tensors, head: str, x: torch.Tensor) -> torch.Tensor:
    if f"{head}.weight" in w:
        return x @ w[f"{head}.weight"].T + w[f"{head}.bias"]
    return torch.tanh(x @ w[f"{head}.0.weight"].T + w[f"{head}.0.bias"]) @ w[f"{head}.2.weight"].T + w[f"{head}.2.bias"]


def random_pixels(sizes: Sizes, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, sizes.channels, sizes.image, sizes.image, generator=generator) * math.sqrt(0.5)
