"""A small version of `python -m training.fuzz`, and proof that it notices what it looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training import conversation_index, fuzz, images
from training.conversation_records import CheckedRecord, check_record
from training.fuzz import FuzzFailure


def test_damaged_data_is_trained_on_or_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz.main(["--records", "300", "--images", "100", "--seed", "1", "--output", str(tmp_path / "fuzz")])
    result = json.loads((tmp_path / "fuzz.json").read_text())
    for name, number in (("records", 300), ("images", 100)):
        found = result[name]
        assert found["mutated"] == number == found["trained_on_correctly"] + found["reported"]
        assert found["trained_on_correctly"] > number / 20
        assert len(found["reported_by_cause"]) >= {"records": 8, "images": 1}[name]
    assert (tmp_path / "fuzz.md").read_text() in capsys.readouterr().out


def test_it_notices_answers_that_are_not_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> CheckedRecord:
        checked = check_record(*arguments, **options)
        checked.messages[-1]["content"] = [{"type": "text", "text": "something else"}]
        return checked

    monkeypatch.setattr(conversation_index, "check_record", wrong)
    with pytest.raises(FuzzFailure, match="not its answers"):
        fuzz.run(40, 0, 0)


def test_it_notices_another_kind_of_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: Path) -> None:
        raise KeyError(path)

    monkeypatch.setattr(images, "load_image", crash)
    with pytest.raises(KeyError):
        fuzz.run(0, 10, 0)
