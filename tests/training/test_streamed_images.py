"""Streams: every row once a pass and once over all processes, resuming is reading on, and bad rows are counted."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from training.batches import load_batches
from training.image_stream import ImageStream, open_stream
from training.images import PixelLoader
from training.labelled_images import LabelledImageDataset
from training.sampling import BatchPlan, SampleKey
from training.streamed_images import UNREADABLE, StreamedBatches, StreamReader, StreamSampler
from training.table_images import DEFAULT_COLUMNS, Columns

sys.path.insert(0, str(Path(__file__).parent))
from picture_rows import PETS, encoded, is_as_red_as, table

pytestmark = pytest.mark.usefixtures("datasets_cache")
ROWS = 14
LABELS = [row % 3 for row in range(ROWS)]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Two files, of 8 and 6 rows in groups of 3."""
    whole, folder = table(LABELS), tmp_path / "pets"
    folder.mkdir()
    whole.select(range(8)).to_parquet(folder / "0.parquet", batch_size=3)
    whole.select(range(8, ROWS)).to_parquet(folder / "1.parquet", batch_size=3)
    return folder


def write_tars(folder: Path) -> Path:
    folder.mkdir()
    for number, rows in enumerate((range(8), range(8, ROWS))):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for row in rows:
                for ending, content in (("png", encoded(10 * row)), ("cls", str(LABELS[row]).encode())):
                    information = tarfile.TarInfo(f"{row:03}.{ending}")
                    information.size = len(content)
                    tar.addfile(information, io.BytesIO(content))
    return folder


def write_folders(folder: Path) -> Path:
    for row, label in enumerate(LABELS):
        path = folder / f"class {label}" / f"{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(10 * row))
    return folder


def reader_of(stream: ImageStream, buffer_size: int = 4, on_bad_sample: str = "raise") -> StreamReader:
    return StreamReader(stream, 7, buffer_size, on_bad_sample, Counter())


def plain(dataset: LabelledImageDataset, indices: Sequence[int], keys: Sequence[SampleKey]) -> dict[str, torch.Tensor]:
    """No augmentation; what a batch was made of."""
    pixels = torch.stack([dataset.pixels(index) for index in indices])
    return {"pixels": pixels, "labels": dataset.labels, "keys": torch.tensor([key[:2] for key in keys])}


def batches_of(image_processor: Any, stream: ImageStream, on_bad_sample: str = "raise") -> StreamedBatches:
    loader = PixelLoader(image_processor, cache_bytes=0)
    return StreamedBatches(plain, loader, stream, on_bad_sample)


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "folders", "saved"])
def test_every_format_gives_every_row(tmp_path, processor, parquet, kind):
    columns, num_labels, data = DEFAULT_COLUMNS, 0, parquet
    if kind == "webdataset":
        columns, num_labels, data = Columns("png", "cls"), 3, write_tars(tmp_path / "tars")
    elif kind == "folders":
        data = write_folders(tmp_path / "folders")
    elif kind == "saved":
        data = tmp_path / "saved"
        table(LABELS).save_to_disk(data)
    stream = open_stream(data, columns, num_labels)
    assert len(stream.label_names) == 3
    sampler = StreamSampler(reader_of(stream), BatchPlan(ROWS, ROWS, ROWS, 1, 0), 0, 2, 0)
    names = []
    for samples in sampler:
        batch = batches_of(processor.image_processor, stream)(samples)
        rows = (batch["pixels"][:, 0, 0, 0].long() // 10).tolist()
        assert sorted(rows) == list(range(ROWS))
        assert rows != list(range(ROWS))  # shuffled
        assert all(is_as_red_as(pixels, row) for pixels, row in zip(batch["pixels"], rows, strict=True))
        assert batch["labels"].tolist() == [LABELS[row] for row in rows]
        names.append({row: sample.name for row, sample in zip(rows, samples, strict=True)})
    expected = {
        "parquet": ["0.parquet[0]", "0.parquet[4]", "1.parquet[3]"],
        "webdataset": ["0.tar: 000", "0.tar: 004", "1.tar: 011"],
        "folders": ["class 0/000.png", "class 1/004.png", "class 2/011.png"],
        "saved": ["saved[0]", "saved[4]", "saved[11]"],
    }[kind]
    assert names[0] == names[1]
    assert [names[0][row] for row in (0, 4, 11)] == expected


def visits(stream: ImageStream, plan: BatchPlan, first_step: int, total_steps: int, rank: int) -> list[list[Any]]:
    sampler = StreamSampler(reader_of(stream), plan, first_step, total_steps, rank)
    return [[(sample.key, sample.name) for sample in samples] for samples in sampler]


@pytest.mark.parametrize(("world_size", "num_samples"), [(1, ROWS), (1, 9), (2, 12), (7, 21), (1, 100)])
def test_resuming_is_reading_on(parquet, world_size, num_samples):
    stream = open_stream(parquet, DEFAULT_COLUMNS)
    plan = BatchPlan(num_samples, 2 * world_size, 1, world_size, 0)  # two micro-batches a step
    total_steps = 11
    first_names: list[str] = []
    for rank in range(world_size):
        straight = visits(stream, plan, 0, total_steps, rank)
        assert len(straight) == 2 * total_steps
        first_names += [name for _, name in straight[0]]
        for first_step in (1, 4, 7, 10):
            assert visits(stream, plan, first_step, total_steps, rank) == straight[2 * first_step :]
    assert len(set(first_names)) == world_size  # each process has rows of its own


def test_epochs_have_their_own_order(parquet):
    stream = open_stream(parquet, DEFAULT_COLUMNS)
    first, second = visits(stream, BatchPlan(ROWS, ROWS, ROWS, 1, 0), 0, 2, 0)
    assert [key for key, _ in second] == [SampleKey(1, offset) for offset in range(ROWS)]
    assert sorted(name for _, name in first) == sorted(name for _, name in second)
    assert [name for _, name in first] != [name for _, name in second]
    shorter = visits(stream, BatchPlan(9, 9, 9, 1, 0), 0, 2, 0)
    assert [name for _, name in shorter[0]] == [name for _, name in first][:9]  # an epoch may end before the data
    longer = [name for batch in visits(stream, BatchPlan(2 * ROWS, ROWS, ROWS, 1, 0), 0, 2, 0) for _, name in batch]
    assert Counter(longer) == dict.fromkeys(longer, 2)  # or go on with another pass
    assert longer[:ROWS] != longer[ROWS:]


def test_without_a_buffer_the_order_is_that_of_the_data(parquet):
    stream = open_stream(str(parquet / "*.parquet"), DEFAULT_COLUMNS)
    names = [name for _, _, name in (row for row, _ in zip(reader_of(stream, 0).rows(0), range(ROWS), strict=False))]
    assert names == [f"0.parquet[{row}]" for row in range(8)] + [f"1.parquet[{row}]" for row in range(6)]


@pytest.mark.parametrize("world_size", [2, 5, 7])
def test_processes_share_a_pass(parquet, world_size):
    """Five row groups: whole ones for up to five processes, every seventh row for seven."""
    stream = open_stream(parquet, DEFAULT_COLUMNS)
    shares = [list(stream.one_pass(3, 4, rank, world_size)) for rank in range(world_size)]
    assert all(shares)
    groups = [{(row["record"][0], int(row["record"].split("[")[1][:-1]) // 3) for row in share} for share in shares]
    if world_size <= 5:  # no process opens what another one reads
        assert sum(map(len, groups)) == 5
    assert sorted(row["record"] for share in shares for row in share) == sorted(
        row["record"] for row in stream.one_pass(5, 4)
    )


def test_workers_change_nothing(parquet, processor):
    stream = open_stream(parquet, DEFAULT_COLUMNS)
    make, plan = batches_of(processor.image_processor, stream), BatchPlan(ROWS, 4, 2, 1, 0)
    runs = [
        list(load_batches(make, StreamSampler(reader_of(stream), plan, 0, 5, 0), workers, pin_memory=False))
        for workers in (0, 2)
    ]
    assert len(runs[0]) == 10
    for alone, shared in zip(*runs, strict=True):
        assert all(torch.equal(alone[name], shared[name]) for name in alone)


# --- bad rows ---------------------------------------------------------------------------------------------------------


def test_bad_rows_are_refused_or_counted(tmp_path, processor, capfd):
    path = tmp_path / "pets.parquet"
    broken = {"bytes": encoded(0)[:45], "path": "x.png"}
    table([0, 1, None, 2, -1, 0], PETS, row1=broken, row5=None).to_parquet(path)
    stream = open_stream(path, DEFAULT_COLUMNS)
    with pytest.raises(ValueError, match=rf"{path}: pets\.parquet\[2\]: 'label' is null"):
        next(iter(StreamSampler(reader_of(stream, 0), BatchPlan(4, 4, 4, 1, 0), 0, 1, 0)))
    reader = reader_of(stream, 0, "skip")
    samples = next(iter(StreamSampler(reader, BatchPlan(4, 4, 4, 1, 0), 0, 1, 0)))
    assert [sample.name for sample in samples] == [f"pets.parquet[{row}]" for row in (0, 1, 3, 5)]
    assert reader.skipped == {"bad label": 2}
    for workers in (0, 1):
        batches = load_batches(batches_of(processor.image_processor, stream), [samples], workers, pin_memory=False)
        with pytest.raises(ValueError, match=rf"{path}: pets\.parquet\[1\]: image 'x\.png' is truncated") as caught:
            list(batches)
        assert "\n" not in str(caught.value)  # of a worker, too
    batch = batches_of(processor.image_processor, stream, "skip")(samples)
    assert batch["labels"].tolist() == [0, -1, 2, -1]
    assert batch[UNREADABLE] == 2
    assert is_as_red_as(batch["pixels"][2], 3)
    told = capfd.readouterr().err
    assert re.findall(rf"left out: {path}: (\S+):", told) == ["pets.parquet[1]", "pets.parquet[5]"]


def test_a_stream_without_a_usable_row_ends(tmp_path):
    path = tmp_path / "pets.parquet"
    table([None, -1]).to_parquet(path)
    with pytest.raises(ValueError, match=r"pets\.parquet holds nothing usable for process 0 of 1"):
        next(reader_of(open_stream(path, DEFAULT_COLUMNS), 4, "skip").rows(0))


def test_what_cannot_be_streamed_is_named(tmp_path):
    plain_numbers, names = tmp_path / "numbers.parquet", tmp_path / "names.parquet"
    table([0, 1], datasets.Value("int64")).to_parquet(plain_numbers)
    table(["a", "b"], datasets.Value("string")).to_parquet(names)
    table([0]).to_parquet(tmp_path / "good.parquet")
    (tmp_path / "torn.parquet").write_bytes(names.read_bytes()[:-9])
    (tmp_path / "torn.tar").write_bytes(b"no tar")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "label": 0}))
    assert open_stream(plain_numbers, DEFAULT_COLUMNS, 2).label_names == ["0", "1"]
    cases = {
        "numbers.parquet": (0, "does not name its classes; count them: --num_labels"),
        "names.parquet": (2, "holds names; a stream needs class numbers"),
        "good.parquet": (2, "has 3 classes; leave num_labels out"),
        "torn.parquet": (0, "cannot be read"),
        "torn.tar": (0, "cannot be read"),
        "nowhere": (0, "does not exist"),
        "metadata.jsonl": (0, "leave streaming out"),
        ".": (0, "leave streaming out"),
    }
    for name, (num_labels, message) in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            open_stream(tmp_path / name, DEFAULT_COLUMNS, num_labels)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
