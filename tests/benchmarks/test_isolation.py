"""Calls in processes of their own: values come back, and every way of failing is told in one line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from benchmarks.isolation import IsolatedError, isolated, main


def identify(word: str) -> dict[str, object]:
    return {"word": word, "process": os.getpid()}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(word: str) -> None:
    raise ValueError(f"not\n{word}")


def test_a_value_comes_back_from_another_process() -> None:
    value = isolated(identify, word="here")
    assert value["word"] == "here"
    assert value["process"] != os.getpid()


def test_a_process_that_memory_kills_is_told() -> None:
    with pytest.raises(IsolatedError, match="killed by signal 9, as happens when memory runs out"):
        isolated(die)


def test_an_end_without_a_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: type("Finished", (), {"returncode": 3}))
    with pytest.raises(IsolatedError, match="exit code 3 and no result"):
        isolated(identify, word="here")


def test_an_exception_is_one_line_and_its_traceback_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = tmp_path / "answer.json"
    assert main([f"{__name__}:refuse", json.dumps({"word": "this"}), str(answer)]) == 1
    assert json.loads(answer.read_text()) == {"error": "ValueError: not this"}
    assert "Traceback" in capsys.readouterr().err

    def run(command: list[str], **_: object) -> object:
        return type("Finished", (), {"returncode": main(command[3:])})

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(IsolatedError, match=r"^ValueError: not this$"):
        isolated(refuse, word="this")
