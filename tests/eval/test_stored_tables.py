"""Columns of images and of lists of images, in Parquet and in Arrow files: their numbers, and their bytes by row."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from eval.stored_tables import StoredTable

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def cell(content: bytes) -> dict[str, object]:
    return {"bytes": content, "path": None}


ROWS = [
    {"id": 0, "cover": cell(b"a"), "pages": [cell(b"b"), cell(b"c")]},
    {"id": 1, "cover": None, "pages": []},
    {"id": 2, "cover": None, "pages": [cell(b"d")]},
    {"id": 3, "cover": cell(b"e"), "pages": None},
]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_images_of_lists_are_counted_and_found_in_every_file(suffix: str, tmp_path: Path) -> None:
    schema = pa.schema({"id": pa.int64(), "cover": IMAGE, "pages": pa.list_(IMAGE)})
    files = []
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        files.append(tmp_path / f"{number}{suffix}")
        table = pa.Table.from_pylist(rows, schema)
        if suffix == ".parquet":
            pq.write_table(table, files[-1], row_group_size=2)
        else:
            with pyarrow.ipc.new_stream(files[-1], schema) as stream:
                stream.write_table(table, max_chunksize=2)
    stored = StoredTable(tuple(files))
    assert len(stored) == 4
    counts = [(row["id"], row["cover"], row["pages"]) for row in stored.rows()]
    assert counts == [(0, 1, 2), (1, 0, 0), (2, 0, 1), (3, 1, 0)]
    assert dict(stored.images([0, 2, 3])) == {0: [b"a", b"b", b"c"], 2: [b"d"], 3: [b"e"]}
