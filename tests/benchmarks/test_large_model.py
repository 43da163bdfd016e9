"""The walk through meta, shards and disk, with a small model."""

from benchmarks.large_model import answer_offloaded, save_random


def test_most_of_a_model_stays_on_disk_and_it_answers(tmp_path, capsys):
    save_random(1, 64, str(tmp_path), "20MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    places = answer_offloaded(1, 64, str(tmp_path), "60MB")
    assert places["disk"] > 0
    assert places["cpu"] > 0
    assert "2 tokens about an image" in capsys.readouterr().out
