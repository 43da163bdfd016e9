"""A user's mistake is one line and exit code 2; a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from defocus_mllm.console import run_script


def fail_with(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "error",
    [
        ValueError("data.json[3]: no image\nadd one"),
        FileNotFoundError("data.json[3]: no image add one"),
        OSError(errno.ENOSPC, "data.json[3]: no image add one"),
        StrictDataclassError("data.json[3]: no image\n  add one"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(error, capsys, monkeypatch):
    monkeypatch.delenv("DEFOCUS_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_script(fail_with(error))
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.endswith("data.json[3]: no image add one\n")
    assert printed.err.count("\n") == 1


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("DEFOCUS_DEBUG", "1")
    with pytest.raises(ValueError, match="bad field"):
        run_script(fail_with(ValueError("bad field")))


@pytest.mark.parametrize("error", [TypeError("a bug"), OSError(errno.EPIPE, "pipe")])
def test_bugs_are_not_hidden(error):
    with pytest.raises(type(error)):
        run_script(fail_with(error))


@pytest.mark.parametrize("lines", [3, 100_000])
def test_cut_output_ends_a_command_without_a_word(lines):
    script = (
        "import sys\nfrom defocus_mllm.console import run_script\nprint('first', flush=True)\nsys.stdin.read()\n"
        f"run_script(lambda: print('a line\\n' * {lines}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as command:
        assert command.stdout.readline() == b"first\n"
        command.stdout.close()
        command.stdin.close()
        assert command.stderr.read() == b""
    assert command.returncode == 141


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_exit_code_is_what_main_returns(returned, code):
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: returned)
    assert stopped.value.code == code


def test_a_finished_command_leaves_its_group_of_processes(tmp_path):
    def main() -> None:
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 0
    assert not torch.distributed.is_initialized()
