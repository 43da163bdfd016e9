"""How the learning rate goes: up along a line, down along a cosine."""

from __future__ import annotations

import math


def cosine_scale(step: int, total_steps: int, warmup_steps: int, floor: float) -> float:
    """Factor on the peak learning rate for the update number `step` (from 0).

    Rises linearly to 1 over `warmup_steps`, then falls along half a cosine; the last step is the one before `floor`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
