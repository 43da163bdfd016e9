"""Stage 2 on data that is bad in ways that show before training, and in ways that show in the middle of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

from training import preflight, stage0, stage1, stage2
from training.bad_samples import BAD_SAMPLES_FILE
from training.run_record import MetricsFile
from training.sampling import epoch_permutation

SKIP = ["--on_bad_sample", "skip", "--max_bad_samples", "3", "--global_batch_size", "2", "--check_images", "0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    data, runs = toy_task.write_data(folder / "data"), folder / "runs"
    for stage, main in (("stage0_language", stage0.main), ("stage0_vision", stage0.main), ("stage1", stage1.main)):
        main(toy_task.stage_words(stage, data, runs))
    return runs


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A record without its picture, found before training; a torn picture, found when its turn comes."""
    data = toy_task.write_data(tmp_path / "data")
    (data / "images" / "6.png").unlink()
    (data / "images" / "3.png").write_bytes((data / "images" / "3.png").read_bytes()[:40])
    return data


def run(data: Path, runs: Path, output: Path, *extra: str) -> Path:
    words = toy_task.stage_words("stage2", data, runs)
    stage2.main([*words, "--output_dir", str(output), *SKIP, "--max_steps", "8", *extra])
    return output


def listed(folder: Path) -> list[tuple[str, str, str]]:
    lines = map(json.loads, (folder / BAD_SAMPLES_FILE).read_text().splitlines())
    return [(line["record"], line["cause"], line["found"]) for line in lines]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in MetricsFile(folder).read()]


EXPECTED = [
    ("conversations.json[6] (id 6)", "image missing", "before training"),
    ("conversations.json[3] (id 3)", "image unreadable", "in training"),
]


def test_bad_samples_are_counted_and_listed_whenever_they_are_found(runs: Path, data: Path, tmp_path: Path) -> None:
    straight = run(data, runs, tmp_path / "straight")
    record = json.loads((straight / "run.json").read_text())
    assert record["num_samples"] == 7
    assert record["bad_samples"] == {"image missing": 1, "image unreadable": 1}
    assert record["facts"]["data_report"]["left_out"]["image missing"]["count"] == 1
    assert listed(straight) == EXPECTED
    # in a batch of their own, workers say and do the same
    workers = run(data, runs, tmp_path / "workers", "--dataloader_num_workers", "2")
    assert listed(workers) == EXPECTED
    assert losses(workers) == losses(straight)


def test_a_resumed_run_lists_and_learns_the_same(
    runs: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(data, runs, tmp_path / "straight", "--save_steps", "6")
    first: dict[str, Any] = json.loads((straight / "run.json").read_text())
    assert listed(straight) == EXPECTED
    (straight / "config.json").unlink()  # as if it had been killed after its last checkpoint
    (straight / "run.json").write_text(json.dumps({**first, "status": "running"}))
    weights = load_file(straight / "model.safetensors")
    again = run(data, runs, straight, "--save_steps", "6")
    assert json.loads((again / "run.json").read_text())["resumed_from_step"] == 6
    assert listed(again) == EXPECTED
    assert all(tensor.equal(weights[name]) for name, tensor in load_file(again / "model.safetensors").items())


def test_more_than_the_budget_ends_the_run(
    runs: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "MICRO_BATCHES", 1)  # which would find it before training otherwise
    late = next(seed for seed in range(20) if 3 not in epoch_permutation(7, seed, 0)[:2])
    with pytest.raises(ValueError, match=r"2 of 8 samples are bad.*max_bad_samples 1 .*conversations\.json\[3\]"):
        run(data, runs, tmp_path / "out", "--max_bad_samples", "1", "--seed", str(late))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert listed(tmp_path / "out") == EXPECTED
    with pytest.raises(ValueError, match="1 of 8 samples are bad"):
        run(data, runs, tmp_path / "none", "--max_bad_samples", "0")
    assert not (tmp_path / "none").exists()  # known before training began


def test_a_first_batch_of_bad_samples_alone_does_not_end_the_preflight(runs: Path, data: Path, tmp_path: Path) -> None:
    first = next(seed for seed in range(50) if epoch_permutation(7, seed, 0)[0] == 3)
    output = run(data, runs, tmp_path / "out", "--seed", str(first), "--per_device_batch_size", "1")
    assert json.loads((output / "run.json").read_text())["status"] == "complete"


def test_a_rehearsal_lists_nothing(runs: Path, data: Path, tmp_path: Path) -> None:
    run(data, runs, tmp_path / "out", "--dry_run", "true")
    assert not (tmp_path / "out").exists()


def test_a_strict_run_ends_at_the_torn_picture(runs: Path, data: Path, tmp_path: Path) -> None:
    toy_task.write_data(tmp_path / "whole")
    (data / "images" / "6.png").write_bytes((tmp_path / "whole" / "images" / "6.png").read_bytes())
    with pytest.raises(ValueError, match=r"conversations\.json\[3\].*3\.png"):
        run(data, runs, tmp_path / "out", "--on_bad_sample", "raise")


def test_two_processes_agree_on_what_is_bad(runs: Path, data: Path, tmp_path: Path) -> None:
    one = run(data, runs, tmp_path / "one")
    words = toy_task.stage_words("stage2", data, runs)
    extra = ["--output_dir", str(tmp_path / "two"), *SKIP, "--max_steps", "8", "--per_device_batch_size", "1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = toy_task.launch([*launcher, toy_task.script("stage2"), *words, *extra])
    assert done.returncode == 0, done.stderr
    assert listed(tmp_path / "two") == EXPECTED
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)


def test_a_mixture_from_a_recipe(runs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
        mixture:
          - {{data: {data}/conversations.json, image_root: {data}/images, weight: 3}}
          - {{data: {data}/dialogues.json, weight: 1}}
        mixture_strategy: with_repetition
        on_bad_sample: skip
        max_bad_samples: "2"
        """
    )
    words = toy_task.stage_words("stage2", data, runs)
    for name in ("--data", "--image_root"):
        at = words.index(name)
        del words[at : at + 2]
    output = tmp_path / "out"
    stage2.main([*words, "--config", str(recipe), "--output_dir", str(output), "--max_steps", "1"])
    printed = capsys.readouterr().out
    assert "in each epoch of the mixture: 7 samples (77.8%), 1 epoch(s)" in printed
    assert "8 samples, " in printed  # the torn picture is found in the check
    record = json.loads((output / "run.json").read_text())
    assert [source["samples"] for source in record["facts"]["data_report"]["sources"]] == [7, 2]
    assert set(record["inputs"]) == {"mixture[0]", "mixture[1]", "model"}
    other = ["--mixture", json.dumps({"data": str(data / "dialogues.json")})]
    with pytest.raises(ValueError, match="differs in mixture"):
        stage2.main([*words, "--output_dir", str(output), "--max_steps", "1", *other])
