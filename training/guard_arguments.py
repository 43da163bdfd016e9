"""Argument of how a run takes steps whose loss or gradient is not finite; a dataclass that all stages share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class GuardArguments:
    """When a run ends because of them."""

    max_nonfinite_steps: int = 0
    """Steps in a row that are skipped, weights unchanged, if loss or gradient norm is not finite; one more ends it."""

    def check_guard(self) -> None:
        """Raise `ValueError` for a negative number."""
        if self.max_nonfinite_steps < 0:
            raise ValueError(f"max_nonfinite_steps: must not be negative, got {self.max_nonfinite_steps}")
