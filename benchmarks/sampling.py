"""One measurement of one thing, and which backends of our cores ran in it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from defocus_mllm.kernels_defocus import kernel_report

KERNEL_VARIABLE = "DEFOCUS_KERNEL"

Backends = dict[str, list[str]]
"""Core -> the backends of it that ran."""


@dataclass(frozen=True)
class Sample:
    """A measured value (seconds or bytes) and the backends that ran meanwhile."""

    value: float
    backends: Backends = field(default_factory=dict)


@dataclass(frozen=True)
class Stopwatch:
    """Measures seconds on one device."""

    device: str = "cpu"
    """Where the work happens; the clock is read when all of it is done."""
    clock: Callable[[], float] = time.perf_counter
    """What is read, in seconds."""

    def read(self) -> float:
        """Seconds on the clock, after all work that was given to the device."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return self.clock()

    def timed(
        self, run: Callable[..., Any], prepare: Callable[[], Any] | None = None, kernel: str | None = None
    ) -> Callable[[], Sample]:
        """A function that measures `run` once each time it is called.

        Args:
            run: what is measured; called with the value of `prepare` if there is one.
            prepare: what is done before, unmeasured.
            kernel: the value of `DEFOCUS_KERNEL` meanwhile; None leaves it as it is.
        """

        def sample() -> Sample:
            with forced_kernel(kernel), observed_backends() as backends:
                arguments = () if prepare is None else (prepare(),)
                started = self.read()
                run(*arguments)
                seconds = self.read() - started
            return Sample(seconds, backends)

        return sample


@contextlib.contextmanager
def forced_kernel(kernel: str | None) -> Iterator[None]:
    """`DEFOCUS_KERNEL` set to `kernel` inside the block; None leaves it alone."""
    before = os.environ.get(KERNEL_VARIABLE)
    try:
        if kernel is not None:
            os.environ[KERNEL_VARIABLE] = kernel
        yield
    finally:
        if before is None:
            os.environ.pop(KERNEL_VARIABLE, None)
        else:
            os.environ[KERNEL_VARIABLE] = before


@contextlib.contextmanager
def observed_backends() -> Iterator[Backends]:
    """Give a dictionary that holds, after the block, the backends that ran in it."""
    before, found = kernel_report(), Backends()
    yield found
    for core, counts in kernel_report().items():
        ran = [backend for backend, count in counts.items() if count > before.get(core, {}).get(backend, 0)]
        if ran:
            found[core] = ran
