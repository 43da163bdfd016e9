"""How every training script ends: a user's mistake is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave the process with its exit code (None counts as 0).

    A ValueError, a FileNotFoundError and the OSErrors of a full or read-only disk are what a user can cause and mend:
    they become `error: <message>` on stderr and exit code 2. With DEFOCUS_DEBUG=1 in the environment they keep their
    traceback. Any other exception is a bug and is left alone.
    """
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, OSError) as error:
        if os.environ.get("DEFOCUS_DEBUG") == "1" or not _is_user_error(error):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _is_user_error(error: ValueError | OSError) -> bool:
    return isinstance(error, (ValueError, FileNotFoundError)) or error.errno in _DISK_ERRORS


def _one_line(error: BaseException) -> str:
    """The message with its line breaks folded, so that a log line stays a line."""
    return " ".join(str(error).split()) or type(error).__name__
