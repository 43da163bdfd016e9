"""What is left out is counted once, listed, and limited; on all processes alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from training.bad_samples import (
    BAD_SAMPLES,
    BAD_SAMPLES_FILE,
    BadSample,
    BadSamples,
    TooManyBadSamples,
    encode,
    parse_limit,
)


def sample(number: int, cause: str = "image missing", found: str = "before training") -> BadSample:
    return BadSample("data.json", f"data.json[{number}]", cause, f"data.json[{number}]: gone", found)


def listed(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / BAD_SAMPLES_FILE).read_text().splitlines()
    return [(line["record"], line["found"]) for line in map(json.loads, lines)]


@pytest.mark.parametrize(
    ("limit", "records", "allowed"),
    [
        ("0", 10, 0),
        ("7", 10, 7),
        ("0%", 9, 0),
        ("1%", 8, 1),
        ("1%", 665_298, 6653),
        ("0.05%", 2000, 1),
        ("100%", 9, 9),
    ],
)
def test_limits(limit: str, records: int, allowed: int) -> None:
    assert parse_limit(limit, records) == allowed


@pytest.mark.parametrize("limit", ["", "-1", "1.5", "101%", "one", "1 %%", "nan"])
def test_other_limits_are_refused(limit: str) -> None:
    with pytest.raises(ValueError, match="max_bad_samples"):
        BadSamples("skip", limit)


def test_more_than_the_limit_ends_the_run_with_the_causes() -> None:
    bad = BadSamples("skip", "2")
    bad.num_records = 10
    bad.add([sample(0), sample(1, "image unreadable"), sample(0)])  # the same one counts once
    bad.check()
    bad.add([sample(2)])
    with pytest.raises(TooManyBadSamples, match=r"3 of 10 .*missing: 2, image unreadable: 1.*data\.json\[2\]: gone"):
        bad.check()
    with pytest.raises(ValueError, match="on_bad_sample"):
        BadSamples("ignore")


def test_the_list_is_written_when_training_begins_and_grows(tmp_path: Path) -> None:
    bad = BadSamples("skip")
    bad.add([sample(0)])
    assert not (tmp_path / BAD_SAMPLES_FILE).exists()
    bad.begin(tmp_path)
    bad.num_records = 5
    batch = {"input_ids": torch.zeros(1), BAD_SAMPLES: encode([sample(3, found="in training")])}
    bad.take_from(batch)
    assert set(batch) == {"input_ids"}
    bad.take_from({BAD_SAMPLES: encode([sample(3, found="in training")])})
    assert bad.num_heard == 2
    bad.share()
    assert bad.num_heard == 0
    assert listed(tmp_path) == [("data.json[0]", "before training"), ("data.json[3]", "in training")]
    assert bad.by_cause() == {"image missing": 2}


def test_a_resumed_run_keeps_what_was_found_in_training(tmp_path: Path) -> None:
    lines = [sample(0), sample(3, found="in training")]
    torn = json.dumps(sample(4, found="in training").__dict__)[:-9]
    text = "".join(json.dumps(line.__dict__) + "\n" for line in lines) + torn
    (tmp_path / BAD_SAMPLES_FILE).write_text(text)
    bad = BadSamples("skip")
    bad.add([sample(1)])  # what was wrong with number 0 has been mended
    bad.begin(tmp_path)
    assert sorted(listed(tmp_path)) == [("data.json[1]", "before training"), ("data.json[3]", "in training")]


def test_a_batch_may_tell_too_much(tmp_path: Path) -> None:
    bad = BadSamples("skip", "1")
    bad.num_records = 10
    bad.begin(tmp_path)
    assert not (tmp_path / BAD_SAMPLES_FILE).exists()
    bad.take_from({})
    bad.take_from({BAD_SAMPLES: encode([sample(1), sample(2)])})
    with pytest.raises(TooManyBadSamples):
        bad.share()
    assert len(listed(tmp_path)) == 2
