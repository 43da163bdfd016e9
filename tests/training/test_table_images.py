"""Labelled pictures through `datasets`: every format, names kept, bad rows refused or counted, and named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from training.labelled_images import format_report, load_labelled_images
from training.table_images import Columns

sys.path.insert(0, str(Path(__file__).parent))
from picture_rows import PETS, encoded, is_as_red_as, table

pytestmark = pytest.mark.usefixtures("datasets_cache")
CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "train.parquet"


@pytest.fixture
def image_processor(processor):
    return processor.image_processor


def test_one_parquet_file(tmp_path, image_processor):
    path = tmp_path / "pets.parquet"
    table([1, 0, 1], PETS).to_parquet(path)
    dataset = load_labelled_images(path, image_processor)
    assert dataset.label_names == ["dog", "cat", "none"]
    assert dataset.problem_type == "single_label_classification"
    assert dataset.labels.tolist() == [1, 0, 1]
    assert dataset.report["label_counts"] == {"dog": 1, "cat": 2, "none": 0}
    batch = dataset.batch([2, 0])
    assert batch["labels"].tolist() == [1, 1]
    pictures = [Image.new("RGB", (8, 6), (value, 0, 0)) for value in (20, 0)]
    assert torch.equal(batch["pixel_values"], image_processor(images=pictures, return_tensors="pt")["pixel_values"])
    assert dataset.pictures.name(2) == "pets.parquet[2]"


@pytest.mark.parametrize("pattern", ["", "part-*.parquet"])
def test_several_parquet_files(tmp_path, image_processor, pattern):
    folder = tmp_path / "pets [2]"  # the name of a folder is no pattern
    folder.mkdir()
    whole = table([1, 0, 1, 2, 0], PETS)
    whole.select(range(3, 5)).to_parquet(folder / "part-1.parquet")
    whole.select(range(3)).to_parquet(folder / "part-0.parquet")
    data = str(folder) if not pattern else f"{tmp_path}/pets*/{pattern}"
    dataset = load_labelled_images(data, image_processor)
    assert dataset.labels.tolist() == [1, 0, 1, 2, 0]
    assert [dataset.pictures.name(row) for row in (0, 2, 3)] == [
        "part-0.parquet[0]",
        "part-0.parquet[2]",
        "part-1.parquet[0]",
    ]
    assert is_as_red_as(dataset.pixels(4), 4)


@pytest.mark.parametrize(
    ("labels", "kind", "names", "numbers"),
    [([2, 0], "int64", ["0", "1", "2"], [2, 0]), (["b", "a"], "string", ["a", "b"], [1, 0])],
)
def test_labels_without_names_and_other_columns(tmp_path, image_processor, labels, kind, names, numbers):
    path = tmp_path / "pets.parquet"
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = table(labels, datasets.Value(kind)).cast_column("image", plain)
    rows.rename_columns({"image": "img", "label": "fine_label"}).to_parquet(path)
    dataset = load_labelled_images(path, image_processor, columns=Columns("img", "fine_label"))
    assert (dataset.label_names, dataset.labels.tolist()) == (names, numbers)
    assert is_as_red_as(dataset.pixels(1), 1)
    with pytest.raises(ValueError, match=r"no column 'image'; it has img, fine_label; name one with --image_column"):
        load_labelled_images(path, image_processor)


def test_class_folders(tmp_path, image_processor):
    folder = tmp_path / "pets"
    for name, value in (("cat/a.png", 0), ("dog/b.jpg", 10), ("cat/c.png", 20)):  # a.png, c.png, b.jpg by path
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(value))
    (folder / "README.txt").write_text("mine")
    dataset = load_labelled_images(folder, image_processor)
    assert dataset.label_names == ["cat", "dog"]
    assert dataset.labels.tolist() == [0, 0, 1]
    assert [dataset.pictures.name(row) for row in range(3)] == ["cat/a.png", "cat/c.png", "dog/b.jpg"]
    assert is_as_red_as(dataset.pixels(1), 2)
    assert "not an image file: 1\n  README.txt" in format_report(dataset.report)
    (folder / "cat" / "c.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cat/c\.png"):
        load_labelled_images(folder, image_processor).pixels(1)
    (folder / "d.png").write_bytes(encoded(0))
    with pytest.raises(ValueError, match=r"d\.png must lie in the subfolder of its class"):
        load_labelled_images(folder, image_processor)


def test_saved_data_set(tmp_path, image_processor):
    rows = table([1, 0], PETS)
    rows.save_to_disk(tmp_path / "saved")
    dataset = load_labelled_images(tmp_path / "saved", image_processor)
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.pictures.name(1) == "saved[1]"
    assert is_as_red_as(dataset.pixels(1), 1)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="several data sets; name the folder of one: test, train"):
        load_labelled_images(tmp_path / "both", image_processor)


def test_folder_with_metadata_is_read_by_it(tmp_path, image_processor):
    (tmp_path / "0.png").write_bytes(encoded(0))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "label": "cat"}\n')
    assert load_labelled_images(tmp_path, image_processor).label_names == ["cat"]


# --- bad rows and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "kind", "named"),
    [
        (None, PETS, "is null"),
        (-1, PETS, "is -1, not from 0 to 2"),  # how `datasets` marks an unlabelled test set
        (-3, datasets.Value("int64"), "is -3, below 0"),
        (None, datasets.Value("string"), "is null"),
    ],
)
def test_bad_labels_are_refused_or_counted(tmp_path, image_processor, label, kind, named):
    path = tmp_path / "pets.parquet"
    good = "a" if getattr(kind, "dtype", "") == "string" else 1
    table([good, label, good], kind).to_parquet(path)
    with pytest.raises(ValueError, match=r"pets\.parquet\[1\]: 'label' " + named):
        load_labelled_images(path, image_processor)
    dataset = load_labelled_images(path, image_processor, on_bad_sample="skip")
    assert len(dataset) == 2
    assert is_as_red_as(dataset.pixels(1), 2)
    assert dataset.pictures.name(1) == "pets.parquet[2]"
    assert dataset.report["left_out"]["bad label"] == [f"pets.parquet[1]: 'label' {named}"]


def test_label_beyond_its_names(tmp_path, image_processor):
    path = tmp_path / "pets.parquet"
    rows = table([0, 7], datasets.Value("int64"))
    rows.cast_column("label", datasets.Value("int64")).to_parquet(path)
    import pyarrow.parquet

    content = pyarrow.parquet.read_table(path)
    features = datasets.Features({"image": datasets.Image(), "label": PETS})
    content = content.replace_schema_metadata(features.arrow_schema.metadata)
    pyarrow.parquet.write_table(content, path)
    with pytest.raises(ValueError, match=r"pets\.parquet\[1\]: .label. is 7, not from 0 to 2"):
        load_labelled_images(path, image_processor)


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        ({"bytes": encoded(0)[:45], "path": "1.png"}, "truncated or corrupt"),
        ({"bytes": b"GIF", "path": None}, "not a picture"),
        ({"bytes": None, "path": "0.png"}, "no image bytes"),
        (None, "no image bytes"),
    ],
)
def test_a_bad_picture_names_file_and_row(tmp_path, monkeypatch, image_processor, cell, named):
    path = tmp_path / "pets.parquet"
    monkeypatch.chdir(tmp_path)
    Path("0.png").write_bytes(encoded(0))
    table([0, 1], PETS, row1=cell).to_parquet(path)
    with pytest.raises(ValueError, match=rf"{path}: pets\.parquet\[1\]: .*{named}"):
        load_labelled_images(path, image_processor).pixels(1)


def test_files_that_cannot_be_read(tmp_path, image_processor):
    good = tmp_path / "good.parquet"
    table([0], PETS).to_parquet(good)
    (tmp_path / "torn.parquet").write_bytes(good.read_bytes()[:-10])
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    table([0], PETS).remove_columns("image").add_column("image", ["0.png"]).to_parquet(tmp_path / "paths.parquet")
    expected = {
        "torn.parquet": "torn.parquet is no whole Parquet file",
        "data.csv": "not a metadata.jsonl, a Parquet file",
        "nowhere.parquet": "does not exist",
        "no*.parquet": "does not exist",
        "empty": "holds no images",
        "paths.parquet": "column 'image' must hold images",
    }
    for name, message in expected.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
            load_labelled_images(tmp_path / name, image_processor)
        assert "\n" not in str(raised.value)
        assert name in str(raised.value)


def test_labels_must_be_classes(tmp_path, image_processor):
    path = tmp_path / "pets.parquet"
    table([0.5], datasets.Value("float32")).to_parquet(path)
    with pytest.raises(ValueError, match="column 'label' must hold class numbers or names"):
        load_labelled_images(path, image_processor)


def test_torchvision_is_not_imported(tmp_path, monkeypatch, image_processor):
    class Refuse:
        """An importer that finds torchvision, and complains."""

        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            assert name.partition(".")[0] != "torchvision"

    path = tmp_path / "pets.parquet"
    table([0], PETS).to_parquet(path)
    monkeypatch.setattr(sys, "meta_path", [Refuse, *sys.meta_path])
    assert load_labelled_images(path, image_processor).batch([0])["labels"].tolist() == [0]
    with pytest.raises(AssertionError):
        import torchvision  # noqa: F401


@pytest.mark.skipif(not CIFAR.is_file(), reason="../shared/data/cifar10 is not here")
def test_cifar10_fits_the_cache(image_processor):
    dataset = load_labelled_images(CIFAR, image_processor)
    assert len(dataset) == 50_000
    assert dataset.label_names[:3] == ["airplane", "automobile", "bird"]
    assert dataset.loader.fits(len(dataset))
    assert set(dataset.report["label_counts"].values()) == {5000}
    assert dataset.batch(range(4))["pixel_values"].shape == (4, 3, 32, 32)
