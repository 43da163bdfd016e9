"""The quickstart's data: derived from training questions alone, the same every time, all or nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import easy_vqa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training import prepare_easy_vqa
from training.conversations import load_conversations
from training.prepare_easy_vqa import ATTRIBUTES, COLORS, SHAPES, caption_from_labels, derive_labels, prepare

QUESTIONS = [
    ("what is the blue shape?", "rectangle", 0),
    ("is there a red shape?", "no", 0),
    ("what color is the shape?", "red", 2),
    ("is there not a circle?", "yes", 2),
    ("is a teal shape present?", "no", 1),
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A three-image stand-in for the package, whose test split fails when touched."""
    paths = {}
    for identifier in (2, 0, 1):
        paths[identifier] = str(tmp_path / f"{identifier}.png")
        Image.new("RGB", (64, 64), (identifier, 0, 0)).save(paths[identifier])

    def sealed():
        raise AssertionError("the test split was opened")

    monkeypatch.setattr(easy_vqa, "get_train_image_paths", lambda: paths)
    monkeypatch.setattr(easy_vqa, "get_train_questions", lambda: list(zip(*QUESTIONS, strict=True)))
    monkeypatch.setattr(easy_vqa, "get_test_questions", sealed)
    monkeypatch.setattr(easy_vqa, "get_test_image_paths", sealed)
    return paths


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_written(package, tmp_path):
    summary = prepare(tmp_path / "data")
    tree = read_tree(tmp_path / "data")
    assert set(tree) == {
        *(f"images/train/{name}" for name in ("0.png", "1.png", "2.png", "metadata.jsonl")),
        *("captions.json", "conversations.json", "data.json", "dialogues.json"),
    }
    assert tree["images/train/2.png"] == Path(package[2]).read_bytes()
    records = json.loads(tree["conversations.json"])
    assert records[0] == {
        "id": "0",
        "image": "train/0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is the blue shape?"},
            {"from": "gpt", "value": "rectangle"},
            {"from": "human", "value": "is there a red shape?"},
            {"from": "gpt", "value": "no"},
        ],
    }
    captions = {record["id"]: record["conversations"] for record in json.loads(tree["captions.json"])}
    assert {name: turns[1]["value"] for name, turns in captions.items()} == {
        "0": "a blue rectangle",
        "2": "a red shape",
    }
    assert captions["0"][0]["value"] == "<image>\nDescribe the image."
    rows = [json.loads(line) for line in tree["images/train/metadata.jsonl"].decode().splitlines()]
    assert [row["file_name"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert rows[1]["labels"] == dict.fromkeys(ATTRIBUTES) | {"teal": 0}
    dialogues = {record["id"]: record["conversations"] for record in json.loads(tree["dialogues.json"])}
    assert set(dialogues) == {"0/0", "2/0"}  # image 1 has no caption to read
    assert all("image" not in record for record in json.loads(tree["dialogues.json"]))
    assert dialogues["0/0"][0]["value"].startswith("a blue rectangle\n")
    assert sorted(turn["value"] for turn in dialogues["0/0"] if turn["from"] == "gpt") == [
        "a blue rectangle",
        "no",
        "rectangle",
    ]
    assert summary["missing"]["images_without_caption"] == [1]
    assert (summary["images"], summary["questions"], summary["captions"]) == (3, 5, 2)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_loader_reads_it(package, tmp_path):
    prepare(tmp_path / "data")
    for name, count in (("conversations.json", 3), ("captions.json", 2)):
        assert len(load_conversations(tmp_path / "data" / name, tmp_path / "data" / "images")) == count


def test_twice_is_equal_and_a_second_run_changes_nothing(package, tmp_path):
    prepare(tmp_path / "a")
    prepare(tmp_path / "b")
    before = read_tree(tmp_path / "a")
    assert before == read_tree(tmp_path / "b")
    package.clear()  # nothing left to read: the second run must be satisfied with what is there
    prepare(tmp_path / "a")
    assert read_tree(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "data.json").unlink(), "data.json"),
        (lambda folder: (folder / "captions.json").unlink(), "captions.json"),
        (lambda folder: (folder / "dialogues.json").write_text("changed"), "dialogues.json"),
        (lambda folder: (folder / "images/train/1.png").unlink(), "images/train"),
        (lambda folder: (folder / "data.json").write_text("[]"), "data.json"),
    ],
)
def test_a_damaged_folder_is_named_not_overwritten(package, tmp_path, damage, named):
    prepare(tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(ValueError, match=named):
        prepare(tmp_path / "data")


def test_a_failure_leaves_nothing_behind(package, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(prepare_easy_vqa, "_summary", fail)
    with pytest.raises(OSError, match="disk"):
        prepare(tmp_path / "out" / "data")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_package_is_explained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ValueError, match="pip install easy-vqa"):
        prepare(tmp_path / "data")


def test_contradictions_are_named():
    with pytest.raises(ValueError, match=r"image 7.*'circle'"):
        derive_labels([("is there a circle?", "yes"), ("is no circle present?", "yes")], "image 7")
    with pytest.raises(ValueError, match="image 8"):
        derive_labels([("what shape is present?", "circle"), ("is there a triangle?", "yes")], "image 8")


def test_the_last_open_attribute_is_known():
    labels, _ = derive_labels([("is there a circle?", "no"), ("is there not a triangle?", "yes")], "image")
    assert [labels[shape] for shape in SHAPES] == [0, 1, 0]


def test_questions_without_a_rule_are_reported():
    labels, not_covered = derive_labels([("how many shapes are there?", "one")], "image")
    assert not_covered == ["how many shapes are there?"]
    assert set(labels.values()) == {None}


@settings(deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(COLORS), st.data())
def test_labels_never_contradict_the_picture(shape, color, data):
    """Whatever is asked about a picture, a derived label is right or unknown."""
    truth = {attribute: int(attribute in (shape, color)) for attribute in ATTRIBUTES}
    asked = data.draw(st.lists(st.tuples(st.sampled_from(ATTRIBUTES), st.sampled_from(["", "not "]))))
    turns = [(f"is there {no}a {name} shape?", "yes" if truth[name] != bool(no) else "no") for name, no in asked]
    labels, not_covered = derive_labels(turns, "image")
    assert not_covered == []
    assert all(value in (None, truth[name]) for name, value in labels.items())
    assert all(labels[name] is not None for name, _ in asked)
    caption = caption_from_labels(labels)
    assert caption in (None, f"a {color} {shape}", f"a {shape}", f"a {color} shape")


def test_every_real_training_question_has_a_rule():
    images, not_covered = prepare_easy_vqa.read_train_split()
    assert (len(images), sum(len(image.turns) for image in images), not_covered) == (4000, 38575, [])
