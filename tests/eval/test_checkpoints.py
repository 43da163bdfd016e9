"""Models by folder and by name on the Hub, whose cache is laid out here by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from eval.checkpoints import find_checkpoint
from eval.generator import Request, TransformersGenerator

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_ASKED = Request("1", "what shape is it?", ())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def _put(model_dir: Path, cache: Path) -> None:
    repository = cache / "models--someone--tiny"
    shutil.copytree(model_dir, repository / "snapshots" / _COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_COMMIT)


def test_a_folder_is_itself(model_dir: Path) -> None:
    found = find_checkpoint(model_dir)
    assert (found.folder, found.name, found.revision) == (model_dir, model_dir.name, None)


def test_a_name_is_found_in_the_cache_with_its_commit(model_dir: Path, cache: Path) -> None:
    _put(model_dir, cache)
    for name in ("someone/tiny", f"someone/tiny@{_COMMIT}", "someone/tiny@main"):
        found = find_checkpoint(name)
        assert (found.name, found.revision, found.folder.name) == ("someone/tiny", _COMMIT, _COMMIT)
    by_name, by_folder = TransformersGenerator("someone/tiny", "cpu"), TransformersGenerator(model_dir, "cpu")
    assert by_name.fingerprint == by_folder.fingerprint
    assert (by_name.describe()["name"], by_name.describe()["revision"]) == ("someone/tiny", _COMMIT)
    assert by_name.generate([_ASKED], 4)[0].text == by_folder.generate([_ASKED], 4)[0].text


@pytest.mark.parametrize("name", ["someone/absent", "someone/tiny@v2", "no-such-folder", "a/b/c", "../elsewhere"])
def test_what_is_nowhere_is_named(name: str, model_dir: Path, cache: Path) -> None:
    _put(model_dir, cache)
    with pytest.raises(FileNotFoundError, match=f"--model.*{name.split('@')[0]}"):
        find_checkpoint(name)


def test_half_a_model_in_the_cache_is_none(model_dir: Path, cache: Path) -> None:
    _put(model_dir, cache)
    (cache / "models--someone--tiny" / "snapshots" / _COMMIT / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"--model: .*{_COMMIT} holds no saved model"):
        find_checkpoint("someone/tiny")


def test_the_record_of_the_training_is_no_part_of_the_model(model_dir: Path) -> None:
    before = TransformersGenerator(model_dir, "cpu").fingerprint
    (model_dir / "run.json").write_text("{}")
    assert TransformersGenerator(model_dir, "cpu").fingerprint == before
    (model_dir / "chat_template.jinja").write_text("{{ messages }}")
    assert TransformersGenerator(model_dir, "cpu").fingerprint != before


def test_a_number_format_is_honoured_and_another_run(model_dir: Path) -> None:
    kept, half = TransformersGenerator(model_dir, "cpu"), TransformersGenerator(model_dir, "cpu", "bfloat16")
    assert (kept.describe()["dtype"], half.describe()["dtype"]) == ("float32", "bfloat16")
    assert kept.settings(4) != half.settings(4)
