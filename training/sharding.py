"""Tensors of which each process holds a shard (FSDP2's), and whole ones: there and back.

Checkpoints hold whole tensors only, so that a run may continue with another number of processes, and so that the result
loads like any other. Tensors that are whole pass through these functions unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every process. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(value: Any, keep: bool) -> Any:
    """`value` with whole tensors on the CPU in place of sharded ones, one tensor after the other.

    Args:
        value: tensors in dictionaries and lists, to any depth; a tensor that appears twice does so in the result.
        keep: false returns None in place of sharded tensors. Every process must call it, but one is to have the memory.
    """
    return _gather(value, keep, {})


def _gather(value: Any, keep: bool, done: dict[int, Any]) -> Any:
    if isinstance(value, DTensor):
        if id(value) not in done:
            full = value.full_tensor().detach()
            done[id(value)] = full.cpu() if keep else None
        return done[id(value)]
    if isinstance(value, dict):
        return {name: _gather(item, keep, done) for name, item in value.items()}
    if isinstance(value, list):
        return [_gather(item, keep, done) for item in value]
    return value


def shard_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """This process's part of the whole `tensor`, placed like `other`; all have the whole, so nothing is sent."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the classes of layers to be sharded one by one: those the model calls indivisible and really has.

    (A De-focus encoder names the layers of all mixers, of which Accelerate would ask for each.) Raises `ValueError` if
    there are none.
    """
    named = set(getattr(model, "_no_split_modules", None) or [])
    if found := sorted(named & {type(module).__name__ for module in model.modules()}):
        return found
    raise ValueError(f"FSDP: {type(model).__name__} names no layers that could be sharded one by one; use DDP")


def original_class(model: nn.Module) -> type[nn.Module]:
    """The class `model` had before FSDP2 put its own in front."""
    kind = type(model)
    return kind.__mro__[2] if isinstance(model, FSDPModule) else kind


def forget_gathered(model: nn.Module) -> None:
    """Let FSDP2 gather all parameters anew at the next forward pass, after their shards were overwritten."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
