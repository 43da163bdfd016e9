"""More processes that answer batches, each with its own copy of the model.

They write nothing: answers come back to the process that started them, which alone writes the journal. So the number of
processes may change from one run to its continuation, and a process that outlives its parent can do no harm.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType

from eval.answering import Outcome, answer
from eval.generator import Generator, Request

MakeGenerator = Callable[[int], Generator]
BATCHES_AHEAD = 2
"""Batches handed to each worker at once: one under way, one waiting so that no worker idles."""


class Workers:
    """A pool of processes; use as a context manager.

    Args:
        make_generator: called in each process with its number, from 1; it must be picklable. Number 0 is the parent.
        count: number of processes.
    """

    def __init__(self, make_generator: MakeGenerator, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        numbers = context.SimpleQueue()
        for number in range(1, count + 1):
            numbers.put(number)
        self.count = count
        self.capacity = count * BATCHES_AHEAD
        self._pool = ProcessPoolExecutor(count, context, _start, (make_generator, numbers))

    def submit(self, batch: Sequence[Request], max_new_tokens: int) -> Future[Outcome]:
        """Answer a batch in one of the processes; its exceptions are raised by the future's `result`."""
        return self._pool.submit(_answer, batch, max_new_tokens)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


_generator: Generator


def _start(make_generator: MakeGenerator, numbers: multiprocessing.SimpleQueue[int]) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    global _generator
    _generator = make_generator(numbers.get())


def _exit_with_parent() -> None:
    """A pool's processes wait for ever for a parent that was killed; this one notices."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _answer(batch: Sequence[Request], max_new_tokens: int) -> Outcome:
    return answer(_generator, batch, max_new_tokens)
