"""The recipe that makes lmms-eval's environment, without a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.eval.harnesses import run


def test_without_a_network_the_reason_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEFOCUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert run.main([]) == 0
    assert "harness tests skipped: pip install: ERROR: " in capsys.readouterr().out
    assert not list((tmp_path / "cache").iterdir())


def test_tests_that_do_not_run_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "make_environment", lambda: tmp_path)
    monkeypatch.setattr(run, "pip", lambda *_: None)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/bin/false")
    assert run.main([]) == 1


def test_what_the_environment_is_made_of_decides_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.environment_folder()
    assert run.environment_folder() == before
    monkeypatch.setattr(run, "site", SimpleNamespace(getsitepackages=lambda: ["elsewhere"]))
    assert run.environment_folder() != before
    assert not any("torchvision" in requirement or "lmms" in requirement for requirement in run.requirements())
