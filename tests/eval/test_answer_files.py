"""Answer files of every kind, whole, damaged and misnamed: read alike, or refused in one line that names the place."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl.styles import Font

from eval.answer_files import read_answers

ROWS = [{"index": "7", "prediction": "A\tcat"}, {"index": "8", "prediction": ""}, {"index": "9", "prediction": "né"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write_workbook(path: Path, *rows: Sequence[object]) -> Path:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    for row in rows:
        sheet.append(row)
    book.save(path)
    return path


@pytest.fixture
def workbook(tmp_path: Path) -> Path:
    """The three rows with numbers for indices, an empty row, a cell left out, a styled empty one, and another sheet."""
    path = write_workbook(
        tmp_path / "answers.xlsx", ["index", "prediction"], [], [7.0, "A\tcat"], [8], ["", None], [9, "né"]
    )
    book = openpyxl.load_workbook(path)
    book.worksheets[0]["C3"].font = Font(bold=True)
    book.create_sheet("notes").append(["nothing"])
    book.save(path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.json", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode()),
        ("list", json.dumps(ROWS, indent=1).encode()),
        ("list.jsonl", b"\n " + json.dumps(ROWS).encode()),
        ("a.tsv", 'index\tprediction\r\n7\t"A\tcat"\r\n8\t\r\n9\tné\r\n'.encode("utf-8-sig")),
    ],
)
def test_texts_hold_the_same_rows(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert [row.values for row in read_answers(tmp_path / name).rows] == ROWS


def test_a_workbook_holds_the_same_rows(workbook: Path) -> None:
    answers = read_answers(workbook)
    assert [row.values for row in answers.rows] == ROWS
    assert answers.container == "Excel workbook"
    assert answers.rows[2].where == f"{workbook}, row 6"


def test_an_object_over_many_lines_and_columns_without_header(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n"results": {"1": 0}}')
    assert read_answers(tmp_path / "a.json").rows[0].values == {"results": {"1": 0}}
    (tmp_path / "b.txt").write_bytes(b'1.png\t"Q?\tYes\r\n\r\n2.png\tP\xe2\x80\xa8?\tNo')
    found = read_answers(tmp_path / "b.txt").rows
    assert [row.values["columns"] for row in found] == [["1.png", '"Q?', "Yes"], ["2.png", "P\u2028?", "No"]]
    assert found[1].where.endswith("b.txt, line 3")


def test_a_folder_and_several_files(tmp_path: Path) -> None:
    for name, row in (("2.jsonl", ROWS[1]), ("1.jsonl", ROWS[0]), (".hidden", {})):
        (tmp_path / name).write_text(json.dumps(row))
    folder = read_answers(tmp_path)
    assert [row.values for row in folder.rows] == ROWS[:2]
    assert folder.container == "2 files, each JSON Lines"
    assert read_answers(tmp_path / "1.jsonl", tmp_path / "2.jsonl").rows == folder.rows
    (tmp_path / "3.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"3\.json: JSON list, but .*1\.jsonl is JSON Lines"):
        read_answers(tmp_path)
    (tmp_path / "inner").mkdir()
    with pytest.raises(ValueError, match="'inner' in it is a folder"):
        read_answers(tmp_path)
    with pytest.raises(FileNotFoundError, match="inner: this folder is empty"):
        read_answers(tmp_path / "inner")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        read_answers(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no answers"),
        ("a.jsonl", LINES.encode()[:-9], "a.jsonl, line 3: malformed JSON"),
        ("a.jsonl", b'{"id": 1}\n\n[2]\n', "a.jsonl, line 3: expected a JSON object, found list"),
        ("a.json", b'[{"id": 1},\n {"id"', "a.json, line 2, column 7: malformed JSON"),
        ("a.json", b'[{"id": 1}, "b"]', "a.json, record 2: expected a JSON object, found 'b'"),
        ("a.json", b'{"results": {"1"', "a.json, line 1, column 17: malformed JSON"),
        ("a.json", b"[" * 100_000, "a.json: malformed JSON"),
        ("a.jsonl", b'{"n": 1}\n{"n": ' + b"9" * 5000 + b"}", "a.jsonl, line 2: malformed JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a.jsonl: not text in UTF-8 \(byte 13\)"),
        ("a.tsv", b"index\tprediction\n7\tA\n8\n", "a.tsv, record 2: 1 columns, but the header has 2"),
        ("a.tsv", b"a\tb\ta\n", "a.tsv: two columns are called 'a'"),
        ("a.tsv", b'index\tprediction\n7\t"A\n', "a.tsv, line 2: malformed table"),
        ("a.xlsx", LINES.encode(), "a.xlsx: not an .xlsx workbook, or a damaged one"),
        ("a.jsonl", b"answer: yes", "a.jsonl, line 1: malformed JSON"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_answers(tmp_path / name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_truncated_and_foreign_workbooks_are_named(workbook: Path, tmp_path: Path) -> None:
    whole = workbook.read_bytes()
    workbook.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"answers\.xlsx: not an \.xlsx workbook, or a damaged one"):
        read_answers(workbook)
    with zipfile.ZipFile(tmp_path / "document.xlsx", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(ValueError, match=r"document\.xlsx: not an \.xlsx workbook"):
        read_answers(tmp_path / "document.xlsx")
    with pytest.raises(ValueError, match="row 2: 3 columns, but the header has 1"):
        read_answers(write_workbook(tmp_path / "ragged.xlsx", ["index"], ["7", None, "x"]))


@given(start=st.integers(0, 10_000), patch=st.binary(min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_damage_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, start: int, patch: bytes
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    contents = {"a.xlsx": write_workbook(folder / "a.xlsx", ["index"], ["7"]).read_bytes(), "b.jsonl": LINES.encode()}
    contents["c.tsv"] = b"index\tprediction\n7\tA\n"
    for name, content in contents.items():
        at = start % len(content)
        (folder / name).write_bytes(content[:at] + patch + content[at + len(patch) :])
        try:
            assert read_answers(folder / name).rows
        except ValueError as error:
            assert str(folder / name) in str(error)  # noqa: PT017 - both outcomes are right
