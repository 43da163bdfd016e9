"""The class of every picture: as the model says, in the data's order, and only for the model's own classes."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from defocus_mllm import DefocusForImageClassification, DefocusImageProcessor, DefocusVisionConfig
from training.classify import main
from training.files import fingerprint

NAMES = ["dark", "light", "red"]


def write_pictures(path: Path, names: list[str], number: int = 7) -> Path:
    generator = torch.Generator().manual_seed(1)
    colours = torch.randint(0, 256, (number, 3), generator=generator).tolist()
    rows = {"image": [Image.new("RGB", (8, 8), tuple(colour)) for colour in colours], "label": [0, 1, 2, 0, 1, 2, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with random weights, and pictures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classify")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = DefocusVisionConfig(image_size=8, patch_size=4, initializer_range=0.5, **sizes)
    config.id2label = dict(enumerate(NAMES))
    config.problem_type = "single_label_classification"
    DefocusForImageClassification(config).save_pretrained(folder / "model")
    DefocusImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "model")
    write_pictures(folder / "test.parquet", NAMES)
    return folder


def words(folder: Path, data: str = "test.parquet", batch_size: int = 3) -> list[str]:
    named = {"model": folder / "model", "data": folder / data, "output": folder / "out" / "predictions.json"}
    return [*(word for name, path in named.items() for word in (f"--{name}", str(path))), f"--batch_size={batch_size}"]


def test_predictions_are_the_models_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(words(folder))
    content = json.loads((folder / "out" / "predictions.json").read_text())
    model = DefocusForImageClassification.from_pretrained(folder / "model").eval()
    processor = DefocusImageProcessor.from_pretrained(folder / "model")
    table = datasets.Dataset.from_parquet(str(folder / "test.parquet"))
    pixel_values = processor(images=list(table["image"]), return_tensors="pt")["pixel_values"]
    expected = model(pixel_values=pixel_values).logits.argmax(-1).tolist()
    assert len(set(expected)) > 1  # or the order could not be wrong
    assert content["predictions"] == expected
    assert content["labels"] == table["label"][:]
    assert content["model"] == fingerprint(folder / "model")
    assert content["data"] == fingerprint(folder / "test.parquet")
    right = sum(one == other for one, other in zip(expected, content["labels"], strict=True))
    assert f"accuracy {right / 7:.4f} on 7 pictures" in capsys.readouterr().out


def test_other_classes_are_refused(folder: Path) -> None:
    write_pictures(folder / "others.parquet", ["dark", "red", "light"])
    with pytest.raises(ValueError, match=r"others\.parquet"):
        main(words(folder, "others.parquet"))


@pytest.mark.parametrize("missing", ["model", "data", "output"])
def test_arguments_are_required(folder: Path, missing: str) -> None:
    given = words(folder)
    position = given.index(f"--{missing}")
    with pytest.raises(ValueError, match=f"{missing}: required"):
        main(given[:position] + given[position + 2 :])
