"""The walk through meta, shards and disk, with a small model."""

import json

from benchmarks import large_model
from benchmarks.large_model import answer_offloaded, save_random


def test_most_of_a_model_stays_on_disk_and_it_answers(tmp_path):
    save_random(1, 64, str(tmp_path), "20MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    loaded, answered = answer_offloaded(1, 64, str(tmp_path), "60MB")
    assert loaded["places"]["disk"] > 0
    assert loaded["places"]["cpu"] > 0
    assert "2 tokens about an image" in answered["step"]
    assert answered["peak_gib"] >= loaded["peak_gib"] > 0


def test_the_record_holds_every_step(tmp_path, monkeypatch):
    steps = {"save_random": [{"step": "written", "peak_gib": 2.0}], "answer_offloaded": []}
    monkeypatch.setattr(large_model, "isolated", lambda function, **arguments: steps[function.__name__])
    large_model.main(["--layers", "1", "--hidden_size", "64", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "large_model.json").read_text())
    assert [step["step"] for step in record["steps"]] == ["0.09 B parameters on meta", "written"]
    assert record["command"].startswith("python -m benchmarks.large_model --layers 1")
    assert {"commit", "seed", "hardware", "versions"} <= set(record)
    assert "| written | 2.00 GiB |" in (tmp_path / "large_model.md").read_text()
