"""Memory for intermediate results that a thread uses over and over: pages never touched cost more than arithmetic."""

from __future__ import annotations

import functools
import math
import threading

import torch

# What is kept of each kind, in bytes; larger requests get fresh memory.
_BYTES_KEPT = 2**24


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_kept = _Kept()


def scratch(use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory of this shape, which the next request for the same `use` overwrites.

    Only for results that nobody sees later, autograd included.
    """
    numbers = math.prod(shape)
    if device.type != "cpu" or numbers * dtype.itemsize > _BYTES_KEPT:
        return torch.empty(shape, dtype=dtype, device=device)
    _keep_freed_memory()
    kept = _kept.memory.get((use, dtype))
    if kept is None or kept.numel() < numbers:
        with torch.inference_mode(False):
            kept = torch.empty(numbers, dtype=dtype)
        _kept.memory[use, dtype] = kept
    return kept[:numbers].view(shape)


@functools.cache
def _keep_freed_memory() -> None:
    """Free one large block: glibc then keeps what a process frees instead of returning it and asking for it again.

    It returns blocks above the largest one that was freed so far, and twice that at the end of the heap; 32 MiB is the
    largest that counts. The block is never touched.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
