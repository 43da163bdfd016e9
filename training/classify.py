"""The class a trained encoder gives to each picture of a data set, in a small JSON file.

    python -m training.classify --model outputs/stage0_vision --data test.parquet --output predictions.json

Stage 0's validation gives one number; two models compared on the same pictures need to know which ones were right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from defocus_mllm import DefocusForImageClassification, DefocusImageProcessor
from defocus_mllm.console import run_script
from defocus_mllm.files import write_json_atomically
from training.argument_parsing import parse_arguments
from training.arguments import require
from training.files import fingerprint
from training.labelled_images import LabelledImageDataset, load_labelled_images
from training.labels import check_same_labels


@dataclass
class ClassifyArguments:
    """What `python -m training.classify` takes."""

    model: str = ""
    """Folder of a trained encoder with its head: stage 0's output_dir."""
    data: str = ""
    """Pictures with one class each, any `data` that stage 0 takes."""
    output: str = ""
    """JSON file for the result; written whole at the end."""
    batch_size: int = 250
    """Pictures at once."""
    cpu: bool = False
    """Stay on the CPU even if there is a GPU."""

    def __post_init__(self) -> None:
        for name in ("model", "data", "output"):
            require(bool(getattr(self, name)), f"{name}: required")
        require(self.batch_size > 0, f"batch_size: must be positive, got {self.batch_size}")


def main(argv: Sequence[str] | None = None) -> None:
    """Classify all pictures and write `output`."""
    arguments = parse_arguments(ClassifyArguments, "classify", argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    model = DefocusForImageClassification.from_pretrained(arguments.model, device_map=device).eval()
    dataset = load_labelled_images(arguments.data, DefocusImageProcessor.from_pretrained(arguments.model))
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    check_same_labels(names, arguments.model, dataset.label_names, arguments.data)
    if dataset.labels.ndim > 1:
        raise ValueError(f"data: {arguments.data} has attributes instead of one class a picture")
    predictions = classify(model, dataset, arguments.batch_size, device)
    content: dict[str, Any] = {
        "model": fingerprint(arguments.model),
        "data": fingerprint(arguments.data),
        "labels": dataset.labels.tolist(),
        "predictions": predictions.tolist(),
    }
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(arguments.output, content)
    print(f"accuracy {(predictions == dataset.labels).float().mean():.4f} on {len(dataset):,} pictures", flush=True)


@torch.inference_mode()
def classify(
    model: DefocusForImageClassification, dataset: LabelledImageDataset, batch_size: int, device: torch.device
) -> torch.Tensor:
    """Predicted class of every picture in float32, (samples,) long on the CPU."""
    predictions = []
    for start in tqdm(range(0, len(dataset), batch_size), desc="classify", unit="batch", mininterval=0.5):
        batch = dataset.batch(range(start, min(start + batch_size, len(dataset))))
        predictions.append(model(pixel_values=batch["pixel_values"].to(device)).logits.argmax(dim=-1).cpu())
    return torch.cat(predictions)


if __name__ == "__main__":
    run_script(main)
