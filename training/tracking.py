"""Trackers of Accelerate beside metrics.jsonl: they are told what that file is told, and end with the run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from training.run_record import arguments_as_dict

PROJECT = "defocus-mllm"


@contextlib.contextmanager
def tracked(accelerator: Accelerator, arguments: Any) -> Iterator[None]:
    """Inside, `accelerator.log` reaches the trackers that `report_to` names, which know the run's arguments."""
    if arguments.report_to and accelerator.is_main_process:
        values = arguments_as_dict(arguments).items()
        # TensorBoard takes no lists and dictionaries
        config = {name: value if isinstance(value, (str, int, float)) else json.dumps(value) for name, value in values}
        accelerator.init_trackers(PROJECT, config)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # not end_training, which ends the processes' group too
            tracker.finish()
        accelerator.trackers.clear()
