"""Asked to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 end a run after the step it is in, with a checkpoint.

SIGTERM is what cluster managers and containers send before they kill, SIGUSR1 what Slurm's `--signal=USR1@300` sends
before the time is up. A signal may reach one process of many, so it is only noted here, and the loop asks all processes
before each step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STOPPED = 75
"""Exit code of a run that stopped because it was asked to: EX_TEMPFAIL of sysexits.h, "try again later"."""
_ONE_CTRL_C = 1.0
"""Seconds in which further SIGINTs belong to the first: the terminal and a launcher both send one."""


class Interrupted(Exception):
    """The run stopped between two steps because a signal asked for it; what was learned is on disk."""

    def __init__(self, signal_name: str, step: int) -> None:
        super().__init__(f"stopped by {signal_name} after step {step}")
        self.signal_name, self.step = signal_name, step


class Interruption:
    """Remembers that a signal came. A second Ctrl-C, a second later or more, raises `KeyboardInterrupt` at once."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._when = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, `SIGNALS` are noted instead of ending the process; outside the main thread nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._when = signal.Signals(number), now
            # not print: the signal may have come in the middle of one
            os.write(2, f"\n{self._received.name}: stopping after this step, with a checkpoint\n".encode())
        elif number == signal.SIGINT and now - self._when > _ONE_CTRL_C:
            raise KeyboardInterrupt

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    def votes(self) -> list[int]:
        """For each of `SIGNALS`: 1 if it is the one that this process got, else 0. Made to be summed over processes."""
        return [int(number == self._received) for number in SIGNALS]


def elected(votes: Sequence[int]) -> str:
    """The name of the first signal that any process voted for; empty if none did."""
    return next((number.name for number, count in zip(SIGNALS, votes, strict=True) if count), "")


def ignore_signals() -> None:
    """For processes that prepare batches: a signal to the whole group must not end them before the step is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run_forwarding(command: Sequence[str]) -> int:
    """Run a command and return its exit code; it gets the `SIGNALS` that this process gets meanwhile."""
    process = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
