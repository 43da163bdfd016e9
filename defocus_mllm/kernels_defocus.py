"""The dispatcher of the numerical cores, and the two helpers that all of them share.

Each core (attention, retention, scan) computes one formula of the paper and has several backends: a plain reference,
exact in any dtype, and faster ones, each tested against it. A core picks the fastest backend that is safe for the
tensors at hand. `DEFOCUS_KERNEL` in the environment forces backends by name, separated by commas: "reference" holds
for every core, any other name for the core that has it. `kernel_report()` says which ones ran.
"""

from __future__ import annotations

import os
from collections import Counter

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

BACKENDS = {
    "attention": ("reference", "folded", "windowed", "flex"),
    "retention": ("reference", "chunked"),
    "scan": ("reference", "chunked", "compiled", "triton"),
}
_runs: Counter[tuple[str, str]] = Counter()


def forced_backend(core: str) -> str | None:
    """The backend that `DEFOCUS_KERNEL` forces for `core`; None if the core may choose ("auto", or none of its names).

    Raises:
        ValueError: `DEFOCUS_KERNEL` has a name that no core knows, or two for this core.
    """
    wanted = [name.strip() for name in os.environ.get("DEFOCUS_KERNEL", "auto").split(",") if name.strip()]
    known = {"auto"}.union(*BACKENDS.values())
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"DEFOCUS_KERNEL: {unknown[0]!r} is no backend; there are {', '.join(sorted(known))}")
    mine = sorted({name for name in wanted if name in BACKENDS[core]})
    if len(mine) > 1:
        raise ValueError(f"DEFOCUS_KERNEL names several backends for the {core} core: {', '.join(mine)}")
    return mine[0] if mine else None


def report_backend(core: str, backend: str) -> str:
    """Count a run of `backend`, log its first one (level info), and return its name."""
    if torch.compiler.is_compiling():
        return backend
    if not _runs[core, backend]:
        logger.info(f"the {core} core runs with the {backend} backend")
    _runs[core, backend] += 1
    return backend


def kernel_report() -> dict[str, dict[str, int]]:
    """Which backend of which core ran how often in this process, for example {"scan": {"compiled": 24}}."""
    report: dict[str, dict[str, int]] = {}
    for (core, backend), count in sorted(_runs.items()):
        report.setdefault(core, {})[backend] = count
    return report


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself in float32 or float64, else a copy in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def group_rms_norm(hidden_states: torch.Tensor, group_size: int, eps: float) -> torch.Tensor:
    """Divide groups of `group_size` neighbouring channels by their root mean square; no weight.

    Source: the norm after the scan in `mamba_block.py` of the release. Returns at least float32, same shape.
    """
    groups = at_least_float32(hidden_states).unflatten(-1, (-1, group_size))
    return (groups * torch.rsqrt(groups.square().mean(dim=-1, keepdim=True) + eps)).flatten(-2)
