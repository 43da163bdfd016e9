"""The frame around every command of `eval`: user errors become one line, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130


def run_script(main: Callable[[], None]) -> None:
    """Run `main` and end the process: 0 on success, 2 after `error: ...` on stderr for errors the user can mend.

    Errors the user can mend are ValueError and OSError (missing file, full disk). Anything else is a defect of this
    project and keeps its traceback (exit code 1); `DEFOCUS_DEBUG=1` shows the traceback of every error.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: finished predictions are kept, the same command resumes", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except (ValueError, OSError) as error:
        if os.environ.get("DEFOCUS_DEBUG") == "1":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
