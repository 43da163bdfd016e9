"""The recipe that takes the common tests of Transformers from its source distribution, without a network."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(HERE))
    spec = importlib.util.spec_from_file_location("upstream_run", HERE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("overrides", None)


def archive_of(folder: Path, *names: str) -> Path:
    archive = folder / "transformers-0.tar.gz"
    with tarfile.open(archive, "w:gz") as target:
        for name in names:
            path = folder / Path(name).name
            path.write_text(name)
            target.add(path, arcname=f"transformers-0/{name}")
    return archive


def test_only_the_common_tests_are_taken(run, tmp_path):
    names = ("tests/test_modeling_common.py", "tests/sub/test_other.py", "setup.py", "tests/picture.png")
    run.unpack_tests(archive_of(tmp_path, *names), tmp_path / "package")
    assert sorted(path.name for path in (tmp_path / "package").iterdir()) == ["__init__.py", "test_modeling_common.py"]


def test_a_distribution_without_tests_and_a_missing_network_skip_with_the_reason(run, tmp_path, monkeypatch, capsys):
    archive = archive_of(tmp_path, "setup.py")
    with pytest.raises(run.Unavailable, match=r"contains no tests/test_modeling_common\.py"):
        run.unpack_tests(archive, tmp_path / "package")
    monkeypatch.setenv("DEFOCUS_CACHE", str(tmp_path / "cache"))
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "1" if name == "PIP_NO_INDEX" else "")
    assert run.main([]) == 0
    assert "upstream tests skipped: pip download transformers==" in capsys.readouterr().out
    assert not list((tmp_path / "cache").iterdir())


def test_a_failure_a_skip_and_a_pass_are_counted(run, tmp_path, capsys):
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite><testcase classname="a.Suite"/><testcase classname="a.Suite"><failure/></testcase>
        <testcase classname="a.Other"><skipped message="no accelerator"/></testcase></testsuite></testsuites>"""
    )
    assert run.summarise(report) == {"passed": 1, "failed": 1, "skipped": 1}
    assert "1  no accelerator" in capsys.readouterr().out


def test_a_run_without_passed_tests_is_an_error(run, monkeypatch, tmp_path):
    def nothing(cache: Path, report: Path, arguments: list[str]) -> int:
        report.write_text("<testsuites/>")
        return 0

    monkeypatch.setattr(run, "fetch", lambda: tmp_path)
    monkeypatch.setattr(run, "run_suites", nothing)
    assert run.main([]) == 1
