"""More processes that answer batches, each with its own copy of the model.

They write nothing: answers come back to the process that started them, which alone writes the journal. So the number of
processes may change from one run to its continuation, and a process that outlives its parent can do no harm.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
        wanted, self._wanted = context.Pipe(duplex=False)
        numbers = context.SimpleQueue()
        for number in range(1, count + 1):
            numbers.put(number)
        self.count = count
        self.capacity = count * BATCHES_AHEAD
        self._pool = ProcessPoolExecutor(count, context, _start, (make_generator, numbers, wanted))

    def submit(self, batch: Sequence[Request], max_new_tokens: int) -> Future[Outcome]:
        """Answer a batch in one of the processes; its exceptions are raised by the future's `result`."""
        return self._pool.submit(_answer, batch, max_new_tokens)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the processes: after an error at once, since nobody will write what they are working on."""
        if error is not None:
            self._wanted.close()
        self._pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise WorkerLostError(
                "a process of --processes ended before its batch was answered (killed for lack of memory?); run again, "
                "with fewer --processes if memory is short: all answers written so far are kept"
            ) from error


class WorkerLostError(ValueError):
    """A process ended in the middle of its work, without an exception to show for it."""


_generator: Generator
_failure: Exception | None = None


def _start(
    make_generator: MakeGenerator,
    numbers: multiprocessing.SimpleQueue[int],
    wanted: multiprocessing.connection.Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent ends the others
    threading.Thread(target=_exit_with_parent, args=(wanted,), daemon=True).start()
    global _generator, _failure
    try:
        _generator = make_generator(numbers.get())
    except Exception as error:
        _failure = error  # the pool would report a process that ended; an answer's exception reaches the parent


def _exit_with_parent(wanted: multiprocessing.connection.Connection) -> None:
    """A pool's processes wait for ever for a parent that was killed; this one notices, or is told by a closed pipe."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel, wanted])
        os._exit(1)


def _answer(batch: Sequence[Request], max_new_tokens: int) -> Outcome:
    if _failure is not None:
        raise _failure
    return answer(_generator, batch, max_new_tokens)
