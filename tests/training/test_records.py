"""JSON lists and JSON Lines are told apart; what is malformed is named by file, line and column."""

from __future__ import annotations

import json

import pytest

from training.records import read_records, record_name

RECORDS = [{"id": 1, "text": "[a]"}, {"text": "é\nline"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS),
        "\n " + json.dumps(RECORDS, indent=2),
        "\ufeff" + json.dumps(RECORDS, ensure_ascii=False),
        "\n\n".join(json.dumps(record) for record in RECORDS) + "\n",
        json.dumps(RECORDS[0]) + "\r\n" + json.dumps(RECORDS[1], ensure_ascii=False),
    ],
)
def test_both_formats_whatever_the_layout(tmp_path, text):
    (tmp_path / "data").write_bytes(text.encode())
    assert read_records(tmp_path / "data") == RECORDS


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    record = {"text": "a\u2028b\x85c"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    assert read_records(tmp_path / "data.jsonl") == [record]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b'[{"id": 1},\n {"id" 2}]', "line 2, column 8"),
        (b'{"id": 1}\n\n{"id": 2', "line 3, column 9"),
        (b"[]", "no record"),
        (b"  \n", "no record"),
        (b"[3]", r"data\.json\[0\] .* is a int"),
        (b'[{"id": "\xff"}]', "not UTF-8"),
    ],
)
def test_malformed_files_are_named(tmp_path, text, named):
    (tmp_path / "data.json").write_bytes(text)
    with pytest.raises(ValueError, match=named) as raised:
        read_records(tmp_path / "data.json")
    assert str(tmp_path / "data.json") in str(raised.value)


def test_a_missing_file_and_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.json does not exist"):
        read_records(tmp_path / "data.json")
    assert record_name("a/data.json", 12, {"id": "x"}) == "data.json[12] (id x)"
    assert record_name("a/data.json", 0, {}) == "data.json[0]"
