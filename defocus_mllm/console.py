"""How every command ends: a user's mistake is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_NOBODY_READS = 141
"""What shells report for a program whose output was cut, as by `| head`."""
USER_ERRORS = (ValueError, OSError, StrictDataclassError)
"""What a user can cause and mend: wrong values, missing files, full disks, a wrong field of a configuration."""


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave the process with its exit code (None counts as 0).

    `USER_ERRORS` become `error: <message>` on stderr and exit code 2; with DEFOCUS_DEBUG=1 in the environment they keep
    their traceback. Output that is cut, as by `| head`, ends the command without a word. Any other exception is a bug
    and is left alone.
    """
    try:
        code = main() or 0
        _leave_process_group()
        sys.stdout.flush()  # here, where a broken pipe is still an exception
        sys.exit(code)
    except KeyboardInterrupt:
        print("error: interrupted; the same command continues where work was saved", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except USER_ERRORS as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_output():
            sys.exit(EXIT_NOBODY_READS)
        if os.environ.get("DEFOCUS_DEBUG") == "1" or (isinstance(error, OSError) and error.errno == errno.EPIPE):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _leave_process_group() -> None:
    """Close the group of processes that `main` joined: left open, its threads can abort a process that has finished."""
    distributed = sys.modules.get("torch.distributed")  # commands without torch do not import it for this
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _nobody_reads_output() -> bool:
    """Whether standard output is the pipe that broke; what is left to write then goes nowhere, without a complaint."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # no file of the operating system
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    is_broken = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return is_broken


def one_line(error: BaseException) -> str:
    """The message with its line breaks folded, so that a log line stays a line."""
    return " ".join(str(error).split()) or type(error).__name__
