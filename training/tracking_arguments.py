"""Argument of where else a run reports to; a dataclass that all stages share."""

from __future__ import annotations

from dataclasses import dataclass, field

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers


@dataclass
class TrackingArguments:
    """Experiment trackers."""

    report_to: list[str] = field(default_factory=list)
    """Trackers of Accelerate that get every line of metrics.jsonl, such as tensorboard, wandb or trackio."""

    def check_tracking(self) -> None:
        """Raise `ValueError` for a tracker that Accelerate does not know or that is not installed."""
        installed = [str(name) for name in get_available_trackers()]
        for name in self.report_to:
            if name not in LOGGER_TYPE_TO_CLASS:
                raise ValueError(f"report_to: unknown tracker {name!r}; choose from {', '.join(LOGGER_TYPE_TO_CLASS)}")
            if name not in installed:
                raise ValueError(f"report_to: {name} is not installed; pip install {name}")
