"""The measurement of packing: what it draws, that it insists on equal losses, and what it writes; no time is judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from training import packing_speed
from training.batches import Batch
from training.encoding import IGNORED
from training.packing_speed import MAX_LENGTH, MIX665K, draw_samples, main, markdown, measure


def test_the_mixture_has_the_published_counts() -> None:
    assert sum(source.samples for source in MIX665K) == 665_298
    assert sum(source.samples for source in MIX665K if not source.image) == 40_688


def test_lengths_are_drawn_in_proportion_and_cut() -> None:
    samples = draw_samples(4000, seed=0)
    assert draw_samples(4000, seed=0) == samples != draw_samples(4000, seed=1)
    assert max(sample.tokens for sample in samples) == MAX_LENGTH
    assert 0.045 < sum(not sample.image for sample in samples) / 4000 < 0.08


@pytest.fixture
def results() -> dict[str, Any]:
    return measure(steps=1, batch=6, rows=2, seed=0)


def test_both_train_the_same_samples_and_packing_saves_padding(results: dict[str, Any]) -> None:
    assert results["largest_difference_of_losses"] < 1e-5
    assert results["padding"]["packed"] < results["padding"]["padded"]
    assert results["rows_per_step"] < 6
    speeds = results["samples_per_second"]
    assert results["ratio"] == speeds["median"]["packed"] / speeds["median"]["padded"]


def test_other_losses_end_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = packing_speed.pack_examples

    def without_boundaries(rows: Any, pad_token_id: int) -> Batch:
        batch = pack(rows, pad_token_id)
        del batch["position_ids"]
        return batch

    monkeypatch.setattr(packing_speed, "pack_examples", without_boundaries)
    with pytest.raises(ValueError, match="step 0: the losses of padded, packed differ"):
        measure(steps=1, batch=6, rows=2, seed=0)


def test_results_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]) -> None:
    given: Iterator[float] = iter([1.6, 1.4])
    monkeypatch.setattr(packing_speed, "measure", lambda *_: {**results, "ratio": next(given)})
    words = ["--output", str(tmp_path), "--steps", "1", "--seed", "3"]
    assert main(words) == 0
    record = json.loads((tmp_path / "packing.json").read_text())
    assert record["command"].startswith("python -m training.packing_speed --output")
    assert {"seed", "commit", "hardware", "versions", "data", "seconds"} <= set(record)
    page = (tmp_path / "packing.md").read_text()
    assert page == markdown(record, "packing.json")
    assert "**1.60 times as many samples a second** at equal loss (limit: 1.5 times, held)" in page
    with pytest.raises(FileExistsError, match="exists already"):
        main(words)
    assert main([*words, "--name", "slow"]) == 1
    assert "**missed**" in (tmp_path / "slow.md").read_text()


def test_what_is_learnt_of_a_sample_is_its_last_third() -> None:
    (sample,) = draw_samples(1, seed=0)
    example = packing_speed.make_example(sample, 0)
    supervised = int((example["labels"] != IGNORED).sum())
    assert len(example["input_ids"]) == sample.tokens
    assert supervised == sample.words // 3
