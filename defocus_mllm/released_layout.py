"""Names and shapes of the tensors in a released De-focus Mamba checkpoint, and the names they have here.

`classification/models/defocus_attention_network.py` and `mamba_block.py` of the release. A shape is written in the
sizes that it depends on, so that one table tells the names, checks the shapes and gives the sizes away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .released import listed

Shape = tuple[str, ...]

# (released name, name here, shape), in the order of the release. "rank+2*states" is the sum of what its parts say.
_CLASS_TOKEN = ("cls_token", "encoder.embeddings.cls_token", ("1", "1", "hidden"))
_POSITIONS = ("pos_embed", "encoder.embeddings.pos_embed", ("1", "patches", "hidden"))
_PATCHES = (
    ("patch_embed.proj.weight", "encoder.embeddings.patch_embed.weight", ("hidden", "channels", "patch", "patch")),
    ("patch_embed.proj.bias", "encoder.embeddings.patch_embed.bias", ("hidden",)),
)
_FREQUENCIES = ("mixer.freq", "mixer.theta", ("states",))
_BLOCK: tuple[tuple[str, str, Shape], ...] = (
    ("norm.weight", "norm.weight", ("hidden",)),
    ("mixer.A_log", "mixer.A_log", ("inner", "states")),
    ("mixer.D", "mixer.D", ("inner",)),
    _FREQUENCIES,
    ("mixer.conv1d.weight", "mixer.conv1d.weight", ("inner", "1", "kernel")),
    ("mixer.conv1d.bias", "mixer.conv1d.bias", ("inner",)),
    ("mixer.in_proj.weight", "mixer.in_proj.weight", ("2*inner", "hidden")),
    ("mixer.x_proj.weight", "mixer.x_proj.weight", ("rank+2*states", "inner")),
    ("mixer.dt_proj.weight", "mixer.dt_proj.weight", ("inner", "rank")),
    ("mixer.dt_proj.bias", "mixer.dt_proj.bias", ("inner",)),
    ("mixer.out_proj.weight", "mixer.out_proj.weight", ("hidden", "inner")),
)
_NORM = (
    ("norm.weight", "encoder.norm.weight", ("hidden",)),
    ("norm.bias", "encoder.norm.bias", ("hidden",)),
)
_HEADS: dict[str, tuple[tuple[str, str, Shape], ...]] = {
    "linear": (("weight", "weight", ("classes", "hidden")), ("bias", "bias", ("classes",))),
    "mlp": (
        ("0.weight", "fc1.weight", ("3*hidden", "hidden")),
        ("0.bias", "fc1.bias", ("3*hidden",)),
        ("2.weight", "fc2.weight", ("classes", "3*hidden")),
        ("2.bias", "fc2.bias", ("classes",)),
    ),
}


@dataclass(frozen=True)
class ReleasedLayout:
    """Which tensors a checkpoint consists of.

    Attributes:
        depth: blocks.
        rotary: whether the mixers have frequencies.
        class_token: whether there is a class token.
        positions: whether there is an absolute position embedding.
        head_type: "linear" (IN-1k) or "mlp" (IN-22k).
        two_heads: whether there is an auxiliary head.
    """

    depth: int
    rotary: bool
    class_token: bool
    positions: bool
    head_type: Literal["linear", "mlp"]
    two_heads: bool

    @classmethod
    def of(cls, names: Iterable[str]) -> ReleasedLayout:
        """The layout that `names` show; what does not belong to it is for `problems` to find."""
        names = set(names)
        blocks = {match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
        return cls(
            # Counted, not read: an index of a billion is a wrong name and not a billion blocks.
            depth=max(1, len(blocks)),
            rotary=any(name.endswith(".mixer.freq") for name in names),
            class_token="cls_token" in names,
            positions="pos_embed" in names,
            head_type="mlp" if any(re.match(r"head2?\.[02]\.", name) for name in names) else "linear",
            two_heads=any(name.startswith("head2.") for name in names),
        )

    def entries(self) -> dict[str, tuple[str, Shape]]:
        """Released name -> (name here, shape), in the order of the release's state dictionary."""
        tensors = [_CLASS_TOKEN] * self.class_token + [_POSITIONS] * self.positions + list(_PATCHES)
        block = [entry for entry in _BLOCK if self.rotary or entry is not _FREQUENCIES]
        for index in range(self.depth):
            for released, here, shape in block:
                tensors.append((f"blocks.{index}.{released}", f"encoder.layers.{index}.{here}", shape))
        tensors += _NORM
        for head in ("head", "head2")[: 1 + self.two_heads]:
            for released, here, shape in _HEADS[self.head_type]:
                tensors.append((f"{head}.{released}", f"{head}.{here}", shape))
        return {released: (here, shape) for released, here, shape in tensors}


def sizes_of(layout: ReleasedLayout, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The sizes that most tensors agree on, by the names of the table; a size that no tensor shows is left out."""
    votes: dict[str, Counter[int]] = {}
    for name, (_, shape) in layout.entries().items():
        if name in tensors and tensors[name].ndim == len(shape):
            for size, length in zip(shape, tensors[name].shape, strict=True):
                if size.isalpha():
                    votes.setdefault(size, Counter())[length] += 1
    return {size: counter.most_common(1)[0][0] for size, counter in votes.items()}


def problems(layout: ReleasedLayout, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> list[str]:
    """One sentence each for tensors that are missing, unknown or of a wrong shape; empty if all is well."""
    entries = layout.entries()
    missing = [name for name in entries if name not in tensors]
    unknown = [name for name in tensors if name not in entries]
    wrong = []
    for name, (_, shape) in entries.items():
        if name in tensors:
            expected = [_length(axis, sizes) for axis in shape]
            found = list(tensors[name].shape)
            if len(found) != len(expected) or any(e not in (None, f) for e, f in zip(expected, found, strict=True)):
                text = ", ".join("?" if length is None else str(length) for length in expected)
                wrong.append(f"{name} ({', '.join(map(str, found))}) instead of ({text})")
    kinds = (("missing", missing), ("unknown", unknown), ("of a wrong shape", wrong))
    return [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds if names]


def _length(axis: str, sizes: Mapping[str, int]) -> int | None:
    """The length of an axis such as "rank+2*states"; None if a size in it is unknown."""
    total = 0
    for term in axis.split("+"):
        factor, _, size = term.rpartition("*")
        length = int(size) if size.isdigit() else sizes.get(size)
        if length is None:
            return None
        total += int(factor or 1) * length
    return total
