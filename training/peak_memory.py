"""The most memory this process has taken so far, for the progress bar."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> str:
    """Such as "1.5 GiB": of tensors on a GPU, or of the process where it computes on the CPU."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_of_process()
    return f"{used / 2**30:.1f} GiB"


def _peak_of_process() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # what `resource` says on Linux began with the parent's memory
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
