"""An index is made once for all processes, follows its source, and costs no memory, however many records there are."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from training import conversation_index
from training.conversation_index import open_index
from training.conversations import load_conversations

MEASURE = """
import sys
from training.conversations import load_conversations
def own_bytes():  # not the pages of the mapped file, which all processes share and the system can take back
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
load_conversations(sys.argv[1])[0]  # what the libraries take
before = own_bytes()
dataset = load_conversations(sys.argv[2])
texts = sum(len(dataset[number].messages[0]["content"][0]["text"]) for number in range(0, len(dataset), 7))
images = int(dataset.num_images.sum())
print(len(dataset), own_bytes() - before)
"""


def write(path: Path, number: int, length: int = 10) -> Path:
    with path.open("w") as stream:
        for index in range(number):
            turns = [{"from": "human", "value": "q" * length}, {"from": "gpt", "value": f"answer {index}"}]
            stream.write(json.dumps({"id": index, "conversations": turns}) + "\n")
    return path


def open_and_count(path: Path, cache: Path, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    assert len(open_index(path, cache=cache)) == 3000


def test_one_process_builds_it_and_the_others_wait(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "data.jsonl", 3000), tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=open_and_count, args=(path, cache, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    folders = [folder for folder in cache.iterdir() if folder.is_dir()]
    assert len(folders) == 1
    built = (folders[0] / "index.json").stat().st_mtime_ns
    open_index(path, cache=cache)
    assert (folders[0] / "index.json").stat().st_mtime_ns == built


def test_it_follows_the_content_the_name_and_the_repairs(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "data.jsonl", 2), tmp_path / "cache"
    assert len(open_index(path, cache=cache)) == 2
    write(path, 3)
    assert len(open_index(path, cache=cache)) == 3
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert open_index(copy, cache=cache).name(2) == "copy.jsonl[2] (id 2)"
    open_index(path, repair=True, cache=cache)
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 4


def test_an_interrupted_build_leaves_nothing_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "data.jsonl", 5), tmp_path / "cache"
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(conversation_index, "check_record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_index(path, cache=cache)
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == []
    assert len(open_index(path, cache=cache)) == 5


def test_work_of_a_killed_build_is_removed(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "data.jsonl", 5), tmp_path / "cache"
    open_index(path, cache=cache)
    folder = next(entry for entry in cache.iterdir() if entry.is_dir())
    folder.rename(cache / f".partial-{folder.name}-4711")
    assert len(open_index(path, cache=cache)) == 5
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == [folder]


def test_damage_is_named(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "data.jsonl", 5), tmp_path / "cache"
    open_index(path, cache=cache)
    folder = next(entry for entry in cache.iterdir() if entry.is_dir())
    (folder / "conversations.arrow").write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"{folder.name}.*is damaged"):
        open_index(path, cache=cache)


def test_batches_are_bounded_by_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation_index, "_BYTES_AT_ONCE", 2000)
    index = open_index(write(tmp_path / "data.jsonl", 40, length=300), cache=tmp_path / "cache")
    assert [index.messages(row)[1]["content"][0]["text"] for row in range(40)] == [f"answer {row}" for row in range(40)]
    assert len(list(index._rows.batches())) > 4
    with pytest.raises(IndexError):
        index.name(40)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs Linux to tell a process's own memory")
def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    few, many = write(tmp_path / "few.jsonl", 10), write(tmp_path / "many.jsonl", 10_000, length=2000)
    load_conversations(many)  # built by another process, as for all but one of the ranks
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(few), str(many)], capture_output=True, text=True, check=True, timeout=120
    )
    number, grown = map(int, done.stdout.split())
    assert number == 10_000
    assert many.stat().st_size > 20_000_000
    assert grown < 4_000_000
