"""Packing and grouping in whole runs of stage 2: equal loss at every step, resumed and with two processes too."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from training import stage0, stage1, stage2
from training.run_record import MetricsFile

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

TIMINGS = {"tokens_per_second", "images_per_second", "seconds"}
PACK = ("--packing", "pack", "--max_length", "200")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Lengths are kept here and not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, runs up to stage 1), with conversations of one to five turns, some of them without an image."""
    folder = tmp_path_factory.mktemp("toy")
    data, runs = toy_task.write_data(folder / "data"), folder / "runs"
    for stage, main in (("stage0_language", stage0.main), ("stage0_vision", stage0.main), ("stage1", stage1.main)):
        main(toy_task.stage_words(stage, data, runs))
    records: list[dict[str, Any]] = json.loads((data / "conversations.json").read_text())
    for number, record in enumerate(records):
        record["conversations"] += record["conversations"][2:] * (number % 4)
        if number % 3 == 2:
            del record["image"]
            record["conversations"][0]["value"] = "what color is it?"
    (data / "conversations.json").write_text(json.dumps(records))
    return data, runs


def words(toy: tuple[Path, Path], output: Path, *extra: str) -> list[str]:
    taken = toy_task.stage_words("stage2", *toy)
    taken[taken.index("--output_dir") + 1] = str(output)
    taken.remove("--shuffle_turns")
    return [*taken, "--learning_rate", "1e-3", *extra]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in MetricsFile(folder).read()]


def run(toy: tuple[Path, Path], output: Path, *extra: str) -> list[dict[str, Any]]:
    stage2.main(words(toy, output, *extra))
    return metrics(output)


@pytest.fixture(scope="module")
def padded(toy: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of the run without packing."""
    return run(toy, tmp_path_factory.mktemp("padded") / "run")


def assert_same_steps(packed: list[dict[str, Any]], padded: list[dict[str, Any]]) -> None:
    assert len(packed) == len(padded) == 4
    for ours, theirs in zip(packed, padded, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name in ("step", "epoch", "learning_rate", "samples_per_step", "supervised_tokens_per_step"):
            assert ours[name] == theirs[name]


def test_packed_run_has_the_losses_of_the_padded_one_and_less_padding(
    toy: tuple[Path, Path], padded: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = run(toy, tmp_path / "run", *PACK)
    assert_same_steps(packed, padded)
    assert sum(line["padding"] for line in packed) < sum(line["padding"] for line in padded) / 2
    assert "rows hold the 4 samples of a step" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [("--per_device_batch_size", "1"), ("--dataloader_num_workers", "1")])
def test_accumulation_and_workers_change_nothing(
    extra: tuple[str, ...], toy: tuple[Path, Path], padded: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert_same_steps(run(toy, tmp_path / "run", *PACK, *extra), padded)


def test_two_processes_learn_what_one_does(
    toy: tuple[Path, Path], padded: list[dict[str, Any]], tmp_path: Path
) -> None:
    distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = toy_task.launch(
        [*distributed, toy_task.script("stage2"), *words(toy, tmp_path / "run", *PACK, "--per_device_batch_size", "1")]
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2
    assert_same_steps(metrics(tmp_path / "run"), padded)


@pytest.mark.parametrize(
    "extra",
    [
        (*PACK, "--shuffle_turns", "--max_turns", "3", "--per_device_batch_size", "1"),
        ("--group_by", "modality_length"),
    ],
)
def test_resumed_run_equals_the_straight_one(
    extra: tuple[str, ...], toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = (*extra, "--save_steps", "3", "--logging_steps", "2")
    straight = run(toy, tmp_path / "straight", *extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.stages.save_final", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(toy, tmp_path / "resumed", *extra)
    assert run(toy, tmp_path / "resumed", *extra) == straight
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "straight"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def stopped(*_: Any) -> None:
    """Stands for a kill after the last step: the run continues from step 3, between two logged steps."""
    raise KeyboardInterrupt


def test_grouped_run_tells_what_it_gains(
    toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(toy, tmp_path / "run", "--group_by", "length")
    told = capsys.readouterr().out
    assert "grouped by length: " in told
    assert "in random order)" in told
    assert all(0 <= line["padding"] < 1 for line in lines)


def test_packing_and_grouping_at_once_are_refused(toy: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group_by: length cannot go with packing: pack"):
        run(toy, tmp_path / "run", *PACK, "--group_by", "length")


@pytest.mark.parametrize("how", [("--packing", "pack"), ("--group_by", "length")])
def test_conversations_that_do_not_fit_are_named_or_left_out_before_the_first_step(
    how: tuple[str, str], toy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that are not among the few that are looked at."""
    records = json.loads((toy[0] / "conversations.json").read_text())
    records[5]["conversations"][0]["value"] += " what color is it?" * 20
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    extra = (*how, "--data", str(data), "--max_length", "120", "--check_images", "1")
    with pytest.raises(ValueError, match=r"data.json\[5\].*more than max_length 120"):
        run(toy, tmp_path / "run", *extra)
    run(toy, tmp_path / "run", *extra, "--on_bad_sample", "skip")
    assert "left out: " in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["num_samples"] == 7
    assert record["bad_samples"] == {"cannot be encoded": 1}
    with pytest.raises(ValueError, match="max_bad_samples"):
        run(toy, tmp_path / "other", *extra, "--on_bad_sample", "skip", "--max_bad_samples", "0")


def test_an_image_that_turns_out_bad_keeps_its_place_in_its_row(toy: tuple[Path, Path], tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(toy[0] / "images", images)
    (images / "3.png").write_bytes(b"no picture")
    lines = run(
        toy, tmp_path / "run", *PACK, "--image_root", str(images), "--on_bad_sample", "skip", "--check_images", "1"
    )
    assert len(lines) == 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["bad_samples"] == {"image unreadable": 1}


@pytest.mark.parametrize("how", [("--packing", "pack"), ("--group_by", "modality_length")])
def test_a_stream_has_neither(how: tuple[str, str], toy: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{how[0][2:]}: needs the lengths of all conversations, which a stream"):
        run(toy, tmp_path / "run", *how, "--streaming", "true")
