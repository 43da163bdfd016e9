"""JSON lists and JSON Lines are told apart; what is malformed is named by file, line and column."""

from __future__ import annotations

import json
import re

import pytest

from training import records
from training.records import MalformedLine, iterate_records, read_records, record_name

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


@pytest.mark.parametrize("block", [7, 64])
def test_lists_are_read_through_a_small_window(tmp_path, monkeypatch, block):
    monkeypatch.setattr(records, "_BLOCK", block)
    values = [{"id": number, "text": 'é"\\],' * number, "n": -1.5e3, "t": [True, None]} for number in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    assert read_records(tmp_path / "data.json") == values
    text = json.dumps(values, indent=1)
    for cut in range(1, len(text), 97):
        (tmp_path / "torn.json").write_text(text[:cut] + "?" + text[cut + 1 :])
        try:
            json.loads((tmp_path / "torn.json").read_text())
        except json.JSONDecodeError as error:
            message = re.escape(f"line {error.lineno}, column {error.colno}: {error.msg}")
            with pytest.raises(ValueError, match=f"{message}$"):
                read_records(tmp_path / "torn.json")


@pytest.mark.parametrize(
    "text", ["[" * 99_999, '[{"a": ' + "[" * 99_999, "[{}, " + "9" * 5000 + "]", "[{}] x", "[{} {}]"]
)
def test_odd_lists_are_malformed_json(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.json: malformed JSON at line 1"):
        read_records(tmp_path / "data.json")


def test_records_of_unreasonable_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST_RECORD", 1000)
    monkeypatch.setattr(records, "_BLOCK", 64)
    for name, text in (("a.json", '[{"text": "' + "x" * 5000), ("a.jsonl", '{"text": "' + "x" * 5000 + '"}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="longer than 1,000"):
            read_records(tmp_path / name)


def test_a_bad_line_does_not_end_the_reading(tmp_path):
    lines = [
        b'{"id": 1}',
        b"{",
        b'{"id": "\xff"}',
        b'{"a": ' + b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"id": 6}',
    ]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    values = list(iterate_records(tmp_path / "data.jsonl"))
    assert [isinstance(value, MalformedLine) for value in values] == [False, True, True, True, True, False]
    assert all(f"line {number}" in str(values[number - 1]) for number in range(2, 6))


def test_a_missing_file_and_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.json does not exist"):
        read_records(tmp_path / "data.json")
    assert record_name("a/data.json", 12, {"id": "x"}) == "data.json[12] (id x)"
    assert record_name("a/data.json", 0, {}) == "data.json[0]"
