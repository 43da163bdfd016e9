"""Arguments of runs on many processes; a dataclass that all stages share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ScaleArguments:
    """How many processes there must be."""

    world_size: int = 0
    """If positive: the number of processes the launch must have started; a run with another number is refused."""
