"""Every kind of source gives the same conversations and pictures, in order, from where they lie."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from training.bad_samples import BadSamples
from training.conversations import ConversationDataset, SourceOptions, load_conversations, open_conversations
from training.images import StoredImage

pytestmark = pytest.mark.usefixtures("datasets_cache")

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), COLOURS[number]).save(buffer, format="PNG")
    return buffer.getvalue()


def turns(num_images: int, who: str = "from", what: str = "value") -> list[dict[str, str]]:
    roles = ("human", "gpt") if who == "from" else ("user", "assistant")
    return [{who: roles[0], what: "<image>\n" * num_images + "Which?"}, {who: roles[1], what: f"{num_images} of them"}]


def colours(dataset: ConversationDataset) -> list[list[Any]]:
    """The colour of each picture of each conversation."""
    found: list[list[Any]] = []
    for number in range(len(dataset)):
        parts = [part for message in dataset[number].messages for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        pixels = [(image.load() if isinstance(image, StoredImage) else Image.open(image)) for image in images]
        found.append([image.convert("RGB").getpixel((0, 0)) for image in pixels])
    return found


EXPECTED = [[COLOURS[0]], [], [COLOURS[1], COLOURS[2]]]
NUMBERS = [[0], [], [1, 2]]


def write_parquet(folder: Path) -> Path:
    cells = [[{"bytes": picture(number), "path": None} for number in numbers] for numbers in NUMBERS]
    table = pyarrow.table(
        {"id": [7, 8, 9], "conversations": [turns(len(numbers)) for numbers in NUMBERS], "images": cells}
    )
    pyarrow.parquet.write_table(table, folder / "train.parquet", row_group_size=2)
    return folder / "train.parquet"


def write_saved(folder: Path) -> Path:
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = {
        "messages": [turns(len(numbers), "role", "content") for numbers in NUMBERS],
        "images": [[{"bytes": picture(number), "path": None} for number in numbers] for numbers in NUMBERS],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def write_shards(folder: Path) -> Path:
    (folder / "shards").mkdir()
    for shard, numbers in (("a-0.tar", [0, 1]), ("a-1.tar", [2])):
        with tarfile.open(folder / "shards" / shard, "w") as archive:
            for number in numbers:
                members = {f"{place}.png": picture(colour) for place, colour in enumerate(NUMBERS[number])}
                record = {"id": number, "image": "elsewhere.jpg", "conversations": turns(len(NUMBERS[number]))}
                members["json"] = json.dumps(record).encode()
                for ending, content in members.items():
                    member = tarfile.TarInfo(f"part/{number:04}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder / "shards"


def write_lines(folder: Path) -> Path:
    (folder / "coco").mkdir()
    records = []
    for numbers in NUMBERS:
        for number in numbers:
            (folder / "coco" / f"{number}.jpg").write_bytes(picture(number))
        names = [f"coco/{number}.jpg" for number in numbers]
        image = {} if not names else {"image": names[0] if len(names) == 1 else names}
        records.append({**image, "conversations": turns(len(numbers))})
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "data.jsonl"


@pytest.mark.parametrize("write", [write_parquet, write_saved, write_shards, write_lines])
def test_all_kinds_of_sources_give_the_same(tmp_path: Path, write: Any) -> None:
    dataset = load_conversations(write(tmp_path))
    assert colours(dataset) == EXPECTED
    assert dataset.num_images.tolist() == [1, 0, 2]
    assert dataset.num_characters.tolist() == [len("Which?") + len("0 of them")] * 3
    assert dataset.report["images_per_conversation"] == {0: 1, 1: 1, 2: 1}
    assert dataset.report["distinct_images"] == 3
    texts = [dataset[number].messages[1]["content"] for number in range(3)]
    assert texts == [[{"type": "text", "text": f"{count} of them"}] for count in (1, 0, 2)]


def test_records_are_named_by_file_and_place(tmp_path: Path) -> None:
    assert load_conversations(write_parquet(tmp_path))[2].record == "train.parquet[2] (id 9)"
    assert load_conversations(write_shards(tmp_path))[2].record == "a-1.tar[part/0002] (id 2)"
    assert load_conversations(write_saved(tmp_path))[1].record == "saved[1]"


def test_a_table_may_name_files_below_the_image_root(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(picture(0))
    for images in (["0.png", None], [{"bytes": None, "path": "0.png"}, {"bytes": None, "path": None}]):
        table = pyarrow.table({"conversations": [turns(1), turns(0)], "image": images})
        pyarrow.parquet.write_table(table, tmp_path / "paths.parquet")
        dataset = load_conversations(tmp_path / "paths.parquet", tmp_path / "images")
        assert colours(dataset) == [[COLOURS[0]], []]
    table = pyarrow.table({"conversations": [turns(1)], "image": ["../paths.parquet"]})
    pyarrow.parquet.write_table(table, tmp_path / "paths.parquet")
    with pytest.raises(ValueError, match=r"paths\.parquet\[0\].*outside the image root"):
        load_conversations(tmp_path / "paths.parquet", tmp_path / "images")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "no column conversations or messages; it has text"),
        ({"messages": [turns(0)], "image": [3]}, "must hold images"),
        ({"messages": [turns(0)], "image": ["a"], "images": [["a"]]}, "both columns image and images"),
    ],
)
def test_tables_without_conversations_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=message):
        load_conversations(tmp_path / "other.parquet")


def test_other_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        load_conversations(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="holds no conversations"):
        load_conversations(tmp_path)
    (tmp_path / "whole.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"whole\.tar cannot be read"):
        load_conversations(tmp_path / "whole.tar")
    (tmp_path / "torn.parquet").write_bytes(write_parquet(tmp_path).read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"torn\.parquet"):
        load_conversations(tmp_path / "torn.parquet")


def test_bad_lines_and_members_are_left_out_and_named(tmp_path: Path) -> None:
    lines = write_lines(tmp_path)
    lines.write_bytes(lines.read_bytes() + b'{"conversations": [\n' + b'{"id": "\xff"}\n' + b"7\n")
    with pytest.raises(ValueError, match=r"data\.jsonl\[3\].*line 4"):
        load_conversations(lines)
    left_out = load_conversations(lines, on_bad_sample="skip").report["left_out"]
    assert {cause: found["count"] for cause, found in left_out.items()} == {"malformed JSON": 2, "not an object": 1}

    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        for name, content in (("0.json", json.dumps({"conversations": turns(0)})), ("1.json", "{"), ("2.png", "")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    dataset = load_conversations(tmp_path / "bad.tar", on_bad_sample="skip")
    assert len(dataset) == 1
    left_out = dataset.report["left_out"]
    assert {cause: found["count"] for cause, found in left_out.items()} == {
        "malformed JSON": 1,
        "no record in the shard": 1,
    }


def test_sources_are_mixed_and_reported_one_by_one(tmp_path: Path) -> None:
    lines, shards = write_lines(tmp_path), write_shards(tmp_path)
    options = [SourceOptions(str(lines), limit=2), SourceOptions(str(shards))]
    dataset = open_conversations(options, BadSamples())
    assert colours(dataset) == EXPECTED[:2] + EXPECTED
    assert [report["samples"] for report in dataset.report["sources"]] == [2, 3]
    assert [dataset[number].source for number in (1, 2)] == [str(lines), str(shards)]

    weighted = [SourceOptions(str(lines), weight=2.0), SourceOptions(str(shards), weight=1.0)]
    dataset = open_conversations(weighted, BadSamples(), "with_repetition", seed=3)
    assert [report["samples"] for report in dataset.report["sources"]] == [6, 3]
    assert [report["epochs"] for report in dataset.report["sources"]] == [2.0, 1.0]
    assert colours(dataset) == EXPECTED * 3
    with pytest.raises(IndexError):
        dataset[9]

    lines.write_text(lines.read_text() + '{"conversations": []}\n')
    with pytest.raises(ValueError, match=rf"{lines}: data\.jsonl\[3\]"):
        open_conversations(options, BadSamples())
