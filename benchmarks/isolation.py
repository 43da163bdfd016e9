"""Calls a function in a fresh Python process: one that memory kills fails alone, and a peak of memory is its own."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from defocus_mllm.console import one_line
from defocus_mllm.files import write_json_atomically


class IsolatedError(RuntimeError):
    """The call did not end well; the message says how, in one line."""


def isolated(function: Callable[..., Any], **arguments: Any) -> Any:
    """`function(**arguments)` in a process of its own, whose standard output and error stay this one's.

    Args:
        function: a function of a module, by whose name the new process finds it.
        arguments: what JSON can hold, as can the value returned.

    Raises:
        IsolatedError: the function raised, or its process was killed.
    """
    target = f"{function.__module__}:{function.__qualname__}"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.isolation", target, json.dumps(arguments), str(answer)]
        # from the folder that holds this package, so that the same code runs there
        code = subprocess.run(command, cwd=Path(__file__).parents[1]).returncode
        outcome = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    if "error" in outcome:
        raise IsolatedError(outcome["error"])
    if code < 0:
        hint = ", as happens when memory runs out" if -code == signal.SIGKILL else ""
        raise IsolatedError(f"its process was killed by signal {-code}{hint}")
    if "value" not in outcome:
        raise IsolatedError(f"its process ended with exit code {code} and no result")
    return outcome["value"]


def main(words: Sequence[str]) -> int:
    """What the new process runs: `MODULE:FUNCTION ARGUMENTS ANSWER`; the exit code is 1 if the function raised."""
    target, arguments, answer = words
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        write_json_atomically(answer, {"value": function(**json.loads(arguments))})
    except Exception as error:
        traceback.print_exc()
        write_json_atomically(answer, {"error": f"{type(error).__name__}: {one_line(error)}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
