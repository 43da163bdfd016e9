"""Streams of conversations: the same samples as by position, shared among processes, resumed to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy_task
from test_conversation_sources import EXPECTED, picture, turns, write_lines, write_parquet, write_saved, write_shards

from training import stage0, stage1, stage2
from training.bad_samples import BAD_SAMPLES_FILE, BadSamples, TooManyBadSamples
from training.conversation_stream import ConversationReader, ConversationSampler, open_conversation_stream
from training.conversations import SourceOptions, load_conversations
from training.images import StoredImage
from training.loop import TrainingLoop
from training.run_record import MetricsFile
from training.sampling import BatchPlan

pytestmark = pytest.mark.usefixtures("datasets_cache")


def reader(location: Path, buffer: int = 0, policy: str = "raise", limit: str = "100%") -> ConversationReader:
    bad = BadSamples(policy, limit)
    bad.num_records = 100
    return ConversationReader(open_conversation_stream(SourceOptions(str(location))), 0, buffer, bad)


def one_pass(source: ConversationReader, number: int, *arguments: int) -> list[Any]:
    rows = source.rows(0, *arguments)
    return [next(rows) for _ in range(number)]


def colour(image: Any) -> Any:
    from PIL import Image

    return (image.load() if isinstance(image, StoredImage) else Image.open(image)).convert("RGB").getpixel((0, 0))


@pytest.mark.parametrize("write", [write_parquet, write_shards, write_lines])
def test_a_stream_gives_what_positions_give(tmp_path: Path, write: Any) -> None:
    location = write(tmp_path)
    by_position = load_conversations(location)
    streamed = [conversation for conversation, _ in one_pass(reader(location), 3)]
    assert [conversation.record for conversation in streamed] == [by_position[n].record for n in range(3)]
    for number, conversation in enumerate(streamed):
        parts = [part for message in conversation.messages for part in message["content"]]
        assert [colour(part["image"]) for part in parts if part["type"] == "image"] == EXPECTED[number]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        assert texts == [p["text"] for m in by_position[number].messages for p in m["content"] if p["type"] == "text"]


def write_many(folder: Path, number: int, shards: int) -> Path:
    (folder / "many").mkdir()
    for shard in range(shards):
        lines = [json.dumps({"id": n, "conversations": turns(0)}) for n in range(shard, number, shards)]
        (folder / "many" / f"{shard}.jsonl").write_text("\n".join(lines))
    return folder / "many"


@pytest.mark.parametrize(("shards", "world_size"), [(4, 2), (1, 2), (2, 1)])
def test_processes_share_an_epoch(tmp_path: Path, shards: int, world_size: int) -> None:
    location = write_many(tmp_path, 24, shards)
    seen: list[str] = []
    for rank in range(world_size):
        rows = one_pass(reader(location, buffer=8), 24 // world_size, rank, world_size)
        seen += [conversation.record for conversation, _ in rows]
    everything = [conversation.record for conversation, _ in one_pass(reader(location), 24)]
    assert sorted(seen) == sorted(everything)
    assert seen != everything


def test_a_resumed_sampler_goes_on_where_it_stopped(tmp_path: Path) -> None:
    location = write_many(tmp_path, 10, 2)
    plan = BatchPlan(num_samples=10, global_batch_size=4, per_device_batch_size=2, world_size=1, seed=0)

    def batches(first: int) -> list[list[Any]]:
        sampler = ConversationSampler(reader(location, buffer=4), plan, first, 6, 0)
        return [[(sample.key, sample.conversation.record) for sample in batch] for batch in sampler]

    whole = batches(0)
    assert len(whole) == 12
    assert batches(4) == whole[8:]


def test_bad_records_travel_with_the_next_good_one(tmp_path: Path) -> None:
    records = [{"conversations": []}, {"image": "gone.png", "conversations": turns(1)}, {"conversations": turns(0)}]
    path = tmp_path / "data.jsonl"
    path.write_text("{\n" + "".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=r"data\.jsonl: data\.jsonl\[0\]: .*malformed JSON at line 1"):
        one_pass(reader(path), 1)
    [(conversation, passed_over)] = one_pass(reader(path, policy="skip"), 1)
    assert conversation.record == "data.jsonl[3]"
    assert [bad.cause for bad in passed_over] == ["malformed JSON", "no conversation", "image missing"]
    with pytest.raises(TooManyBadSamples):
        one_pass(reader(path, policy="skip", limit="1"), 1)
    path.write_text(json.dumps(records[0]))
    with pytest.raises(ValueError, match="holds nothing usable"):
        one_pass(reader(path, policy="skip"), 1)


def test_what_is_no_stream_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        open_conversation_stream(SourceOptions(str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="leave streaming out"):
        open_conversation_stream(SourceOptions(str(write_saved(tmp_path))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no conversations"):
        open_conversation_stream(SourceOptions(str(tmp_path / "empty")))


# --- stage 2 on a stream ----------------------------------------------------------------------------------------------


def stream_words(data: Path, runs: Path, output: Path) -> list[str]:
    words = [*toy_task.stage_words("stage2", data, runs), "--output_dir", str(output), "--streaming", "true"]
    return [*words, "--num_samples", "6", "--shuffle_buffer", "3", "--global_batch_size", "2", "--max_steps", "6"]


def test_stage_2_on_a_stream_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, runs = toy_task.write_data(tmp_path / "data"), tmp_path / "runs"
    for stage, main in (("stage0_language", stage0.main), ("stage0_vision", stage0.main), ("stage1", stage1.main)):
        main(toy_task.stage_words(stage, data, runs))
    (data / "images" / "3.png").write_bytes(picture(0)[:40])
    (data / "images" / "6.png").unlink()
    skip = ["--on_bad_sample", "skip", "--max_bad_samples", "2", "--save_steps", "2"]
    stage2.main([*stream_words(data, runs, tmp_path / "straight"), *skip, "--dataloader_num_workers", "2"])
    found = json.loads((tmp_path / "straight" / "run.json").read_text())["bad_samples"]
    assert found == {"image missing": 1, "image unreadable": 1}
    assert len((tmp_path / "straight" / BAD_SAMPLES_FILE).read_text().splitlines()) == 2

    take_step = TrainingLoop._take_step

    def stop_after_three(loop: TrainingLoop, batches: Any) -> None:
        if loop.step == 3:
            raise KeyboardInterrupt
        take_step(loop, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_take_step", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            stage2.main([*stream_words(data, runs, tmp_path / "stopped"), *skip])
    stage2.main([*stream_words(data, runs, tmp_path / "stopped"), *skip])
    losses = [[line["loss"] for line in MetricsFile(tmp_path / name).read()] for name in ("straight", "stopped")]
    assert losses[0] == losses[1]

    with pytest.raises(ValueError, match="max_bad_samples 1 "):
        stage2.main([*stream_words(data, runs, tmp_path / "strict"), *skip[:2], "--max_bad_samples", "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--streaming", "true", "--max_steps", "-1"], "num_samples or max_steps"),
        (["--num_samples", "5"], "only for a stream"),
        (["--streaming", "true", "--shuffle_buffer", "-1"], "shuffle_buffer"),
        (["--mixture", '{"data": "a.json"}'], "data: required"),
        (["--max_bad_samples", "many"], "max_bad_samples"),
        (["--check_images", "-1"], "check_images"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(tmp_path: Path, words: list[str], message: str) -> None:
    usual = ["--output_dir", str(tmp_path / "out"), "--model", "m", "--data", "d.json", "--max_steps", "1"]
    with pytest.raises(ValueError, match=message):
        stage2.main([*usual, *words])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"weight": 1}, "data is required"),
        ({"data": "a", "wieght": 1}, "unknown field 'wieght'"),
        ({"data": "a", "weight": 0}, "must be positive"),
        ({"data": "a", "weight": "3"}, "weight must be a float"),
        ({"data": "a", "limit": True}, "limit must be a int"),
    ],
)
def test_sources_of_a_mixture_are_checked(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    words = ["--output_dir", str(tmp_path / "out"), "--model", "m", "--mixture_strategy", "with_repetition"]
    with pytest.raises(ValueError, match=rf"mixture\[0\].*{message}"):
        stage2.main([*words, "--mixture", json.dumps(source)])
