"""Validation: the numbers of a straightforward count, no trace in the training, and the run's last word in run.json."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from defocus_mllm import DefocusForImageClassification, DefocusVisionConfig
from training import stage0
from training.labelled_images import load_labelled_images
from training.run_record import MetricsFile
from training.validation import Validation

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

TIMINGS = {"images_per_second", "seconds"}


def process(index: int = 0, count: int = 1) -> Any:
    """An accelerator of one of `count` processes, on the CPU, that keeps what it was to add up in `sums`."""
    accelerator = SimpleNamespace(
        process_index=index, num_processes=count, device=torch.device("cpu"), is_main_process=False, sums=None
    )

    def reduce(values: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        accelerator.sums = values
        return values

    accelerator.reduce, accelerator.autocast = reduce, nullcontext
    return accelerator


def make_data(folder: Path, image_processor: Any, labels: list[Any]) -> Any:
    key = "labels" if isinstance(labels[0], dict) else "label"
    lines = []
    for number, label in enumerate(labels):
        noise = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", key: label}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return load_labelled_images(folder, image_processor)


def make_model(config: DefocusVisionConfig, dataset: Any) -> DefocusForImageClassification:
    config.problem_type = dataset.problem_type
    config.id2label = dataset.id2label
    config.initializer_range = 0.5  # else all pictures get the same answer
    model = DefocusForImageClassification(config)
    model.set_drop_path_rate(0.5)
    return model.train()


@pytest.mark.parametrize("batch_size", [2, 7])
def test_classes(tmp_path, processor, vision_config, batch_size):
    dataset = make_data(tmp_path, processor.image_processor, [0, 3, 6, 6, 2, 1, 5, 4, 4, 3, 2, 1])
    model = make_model(vision_config, dataset)
    model.encoder.eval()  # as a frozen part is
    samples = [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    found = Validation(model, dataset, samples, batch_size)(process())
    assert model.head.training
    assert not model.encoder.training
    model.eval()
    batch = dataset.batch(samples)
    with torch.no_grad():
        logits = model(batch["pixel_values"]).logits
    ranks = (logits > logits.gather(1, batch["labels"][:, None])).sum(1)
    assert found == {
        "validation_accuracy": pytest.approx((ranks == 0).float().mean().item()),
        "validation_top5_accuracy": pytest.approx((ranks < 5).float().mean().item()),
        "validation_loss": pytest.approx(F.cross_entropy(logits, batch["labels"]).item(), rel=1e-5),
        "validation_samples": 10,
    }
    assert 0 < (ranks == 0).sum() < (ranks < 5).sum() < 10  # else this shows nothing


def test_attributes_that_are_not_known_do_not_count(tmp_path, processor, vision_config):
    labels = [{"red": 1, "big": None}, {"red": 0, "big": None}, {"red": None, "big": 1}]
    dataset = make_data(tmp_path, processor.image_processor, labels)
    model = make_model(vision_config, dataset)
    found = Validation(model, dataset, range(3), 2)(process())
    with torch.no_grad():
        logits = model.eval()(dataset.batch(range(3))["pixel_values"]).logits
    told = torch.stack([logits[0, 0], -logits[1, 0], logits[2, 1]])
    assert found["validation_accuracy"] == pytest.approx((told > 0).float().mean().item())
    assert found["validation_loss"] == pytest.approx(F.softplus(-told).mean().item(), rel=1e-5)
    assert set(found) == {"validation_accuracy", "validation_loss", "validation_samples"}


def test_processes_share_the_work(tmp_path, processor, vision_config):
    dataset = make_data(tmp_path, processor.image_processor, [0, 1, 2, 0, 1])
    validation = Validation(make_model(vision_config, dataset), dataset, range(5), 2)
    whole, shares = process(), [process(index, 3) for index in range(3)]
    for accelerator in (whole, *shares):
        validation(accelerator)
    assert [share.sums[0].item() for share in shares] == [2, 2, 1]
    torch.testing.assert_close(sum(share.sums for share in shares), whole.sums, rtol=1e-6, atol=0)


# --- in a run ---------------------------------------------------------------------------------------------------------


def run(data: Path, runs: Path, *extra: str) -> Path:
    stage0.main([*toy_task.stage_words("stage0_vision", data, runs), *extra])
    return runs / "stage0_vision"


def lines(folder: Path, validation: bool) -> list[dict[str, Any]]:
    found = [line for line in MetricsFile(folder).read() if ("validation_samples" in line) == validation]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in found]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_task.write_data(tmp_path_factory.mktemp("validation") / "data")


def test_a_run_validates_its_average_and_learns_the_same(data: Path, tmp_path: Path) -> None:
    words = ["--ema_decay", "0.9", "--drop_path_rate", "0.3", "--save_steps", "1"]
    plain = run(data, tmp_path / "plain", *words)
    metadata = str(data / "images" / "metadata.jsonl")
    folder = run(data, tmp_path / "watched", *words, "--validation_data", metadata, "--validation_steps", "3")
    assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert lines(folder, validation=False) == lines(plain, validation=False)
    assert [line["step"] for line in lines(folder, validation=True)] == [3, 4]
    record = json.loads((folder / "run.json").read_text())
    last = lines(folder, validation=True)[-1]
    assert record["validation"] == {name: value for name, value in last.items() if name != "epoch"}
    assert set(record["inputs"]) == {"data", "validation_data"}
    assert "validation" not in json.loads((plain / "run.json").read_text())
    # what was validated is what was saved
    model = DefocusForImageClassification.from_pretrained(folder)
    from defocus_mllm import DefocusImageProcessor

    dataset = load_labelled_images(metadata, DefocusImageProcessor.from_pretrained(folder))
    again = Validation(model, dataset, range(len(dataset)), 4)(process())
    of_average = {name: value for name, value in record["validation"].items() if not name.endswith("_of_last_weights")}
    assert {**again, "step": 4} == pytest.approx(of_average, rel=1e-6)
    # the last weights, which are not the average, would have said something else
    weights = load_file(plain / "checkpoints" / "step-000004" / "model.safetensors")
    model.load_state_dict(weights)
    assert Validation(model, dataset, range(len(dataset)), 4)(process())["validation_loss"] != pytest.approx(
        last["validation_loss"], rel=1e-4
    )


def test_a_run_stopped_before_it_saved_tells_the_validation_too(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    words = ["--save_steps", "2", "--validation_data", str(data / "images"), "--validation_steps", "1"]
    straight = run(data, tmp_path / "straight", *words)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.stages.save_final", stop)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "stopped", *words)
    folder = run(data, tmp_path / "stopped", *words)
    assert lines(folder, validation=True) == lines(straight, validation=True)
    assert [line["step"] for line in lines(folder, validation=True)] == [1, 2, 3, 4]
    records = [json.loads((path / "run.json").read_text()) for path in (folder, straight)]
    assert records[0]["validation"] == records[1]["validation"]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["blue", "red"], "label 0 is 'red' and 'blue'"), (["red"], "2 and 1 labels")],
)
def test_other_labels_are_refused(data: Path, tmp_path: Path, names: list[str], message: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    record = {"file_name": "0.png", "labels": dict.fromkeys(names, 1)}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as caught:
        run(data, tmp_path / "runs", "--validation_data", str(tmp_path / "metadata.jsonl"))
    assert str(data / "images" / "metadata.jsonl") in str(caught.value)
    assert str(tmp_path / "metadata.jsonl") in str(caught.value)
    assert not (tmp_path / "runs" / "stage0_vision").exists()


def test_validation_steps_need_data(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no validation_data"):
        run(data, tmp_path, "--validation_steps", "2")
