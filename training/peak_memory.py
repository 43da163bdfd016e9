"""The most memory this process has taken so far, for the progress bar."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory(device: torch.device) -> str:
    """Such as "1.5 GiB": of tensors on a GPU, or of the process where it computes on the CPU."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:  # kibibytes, but on macOS bytes
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{used / 2**30:.1f} GiB"
