"""Images inside tables: written once, whole, only those that are asked, and never outside their folder."""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from defocus_mllm.files import PARTIAL_PREFIX, DiskFullError
from eval.harnesses.lmms_tasks import write_task
from eval.registry import Benchmark, get_benchmark
from eval.report import main as report
from eval.run import evaluate
from eval.score import score_file
from eval.stored_images import StoredImages, file_identity
from tests.eval.fake_generator import FakeGenerator


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "defocus_mllm" / "eval"


class Table:
    """Images in memory, and the names that were read."""

    def __init__(self, **images: bytes) -> None:
        self.images = images
        self.asked: list[str] = []

    def __call__(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        self.asked += names
        return ((name, self.images[name]) for name in names if name in self.images)


def test_images_are_written_once_and_only_those_asked(cache: Path) -> None:
    table = Table(a=b"first", b=b"second", c=b"third")
    stored = StoredImages.in_cache("demo", ["origin"], table)
    stored.provide(["b", "a", "b"])
    assert sorted(path.name for path in stored.folder.iterdir()) == ["a", "b"]
    assert (stored.folder / "b").read_bytes() == b"second"
    stored.provide(["a", "c"])
    assert table.asked == ["b", "a", "c"]
    assert stored.folder.parent == cache
    assert StoredImages.in_cache("demo", ["another origin"], table).folder != stored.folder


def test_a_file_that_was_written_again_is_another(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_text("one")
    first = file_identity(path)
    assert file_identity(path) == first
    path.write_text("two")
    os.utime(path, ns=(0, first[2] + 1))
    assert file_identity(path) != first


@pytest.mark.parametrize(
    "name", ["../a", "/a", "images/../../a", "..", "", "a\\..\\b", "a\0", f"images/{PARTIAL_PREFIX}a"]
)
def test_names_cannot_leave_the_folder(name: str, cache: Path) -> None:
    stored = StoredImages.in_cache("demo", None, Table(**{name: b"x"}))
    with pytest.raises(ValueError, match="must be a path inside a folder"):
        stored.provide([name])
    assert not cache.exists()


def test_what_is_missing_or_empty_is_named() -> None:
    with pytest.raises(ValueError, match="image 'b' stands nowhere in the data"):
        StoredImages.in_cache("demo", 1, Table(a=b"x")).provide(["a", "b"])
    stored = StoredImages.in_cache("demo", 2, Table(a=b""))
    with pytest.raises(ValueError, match="image 'a' is empty"):
        stored.provide(["a"])
    assert not (stored.folder / "a").exists()


def test_a_torn_write_is_never_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = StoredImages.in_cache("demo", None, Table(a=b"whole"))

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full_disk:
        full_disk.setattr(os, "fsync", fail)
        with pytest.raises(DiskFullError, match="no space left while writing"):
            stored.provide(["a"])
    assert list(stored.folder.iterdir()) == []
    (stored.folder / f"{PARTIAL_PREFIX}a-1").write_bytes(b"who")  # as a killed process leaves it
    stored.provide(["a"])
    assert (stored.folder / "a").read_bytes() == b"whole"


@pytest.fixture
def mmbench(tmp_path: Path) -> Benchmark:
    """A table of two questions, the first in two rotations; the image of the second is that of the first."""
    Image.new("RGB", (40, 30), (9, 120, 40)).save(tmp_path / "picture.png")
    image = base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()
    rows = [
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage",
        f"7\tQ?\tH\tcat\tdog\t\t\tA\tx\t{image}",
        f"1000007\tQ?\tH\tdog\tcat\t\t\tB\tx\t{image}",
        "8\tWhy?\t\tcat\tdog\t\t\tB\tx\t7",
    ]
    (tmp_path / "data" / "mmbench").mkdir(parents=True)
    (tmp_path / "data" / "mmbench" / "mmbench_dev_20230712.tsv").write_text("\n".join(rows) + "\n")
    return dataclasses.replace(get_benchmark("mmbench"), n_expected=3, fingerprint=None)


def test_mmbench_runs_from_its_table(mmbench: Benchmark, cache: Path, tmp_path: Path) -> None:
    data_root = tmp_path / "data"
    evaluate(mmbench, FakeGenerator(), tmp_path / "glance", data_root, limit=1)
    (folder,) = cache.iterdir()
    assert [path.name for path in folder.iterdir()] == ["7.jpg"]
    generator = FakeGenerator()
    evaluate(mmbench, generator, tmp_path / "out", data_root)
    assert {path.name for path in folder.iterdir()} == {"7.jpg", "8.jpg"}
    assert (folder / "8.jpg").read_bytes() == (tmp_path / "picture.png").read_bytes()
    asked = {request.id: request.images for batch in generator.batches for request in batch}
    assert asked == {"7": (folder / "7.jpg",), "1000007": (folder / "7.jpg",), "8": (folder / "8.jpg",)}
    described = json.loads((tmp_path / "out" / "mmbench" / "results.json").read_text())["benchmark"]
    assert described["data_root"] == str(data_root / "mmbench")
    assert described["image_root"] == str(folder)


def test_a_task_of_lmms_eval_finds_the_images_of_a_table(mmbench: Benchmark, cache: Path, tmp_path: Path) -> None:
    task = write_task(mmbench, mmbench.load_verified(tmp_path / "data"), tmp_path / "task")
    rows = [json.loads(line) for line in task.with_suffix(".jsonl").read_text().splitlines()]
    assert [Path(row["images"][0]).name for row in rows] == ["7.jpg", "7.jpg", "8.jpg"]
    assert all(Path(row["images"][0]).is_relative_to(cache) and Path(row["images"][0]).is_file() for row in rows)


def test_scoring_writes_no_image_and_the_report_those_it_shows(
    mmbench: Benchmark, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.score.get_benchmark", lambda name: mmbench)
    answers = [{"id": name, "text": "A"} for name in ("7", "1000007", "8")]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    score_file("mmbench", tmp_path / "answers.jsonl", tmp_path / "scored", tmp_path / "data")
    assert not cache.exists()
    report(["--evaluation", str(tmp_path / "scored"), "--output", str(tmp_path / "report.html")])
    image = base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()
    assert (tmp_path / "report.html").read_text().count(image) == 3


@pytest.mark.parametrize(("value", "message"), [("%" * 70, "index 8: 'image' is not base64"), ("9", "'8.jpg' stands")])
def test_images_that_are_none_are_named(mmbench: Benchmark, tmp_path: Path, value: str, message: str) -> None:
    table = tmp_path / "data" / "mmbench" / "mmbench_dev_20230712.tsv"
    table.write_text(table.read_text().replace("\t7\n", f"\t{value}\n"))
    with pytest.raises(ValueError, match=message):
        evaluate(mmbench, FakeGenerator(), tmp_path / "out", tmp_path / "data")
