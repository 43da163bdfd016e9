"""Labelled pictures for stage 0, from whatever holds them: files, Parquet, class folders, a saved data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from training.images import CACHE_BYTES, PixelLoader
from training.labelled_data import LabelledData
from training.labels import NAMED_IN_MESSAGE
from training.metadata_images import read_metadata
from training.picture_set import PictureSet
from training.table_images import DEFAULT_COLUMNS, Columns, read_table


class LabelledImageDataset(PictureSet, Dataset[dict[str, torch.Tensor]]):
    """Samples `{"pixel_values": (3, height, width), "labels": () long or (num_labels,) float}`."""

    def __init__(self, data: LabelledData, loader: PixelLoader) -> None:
        super().__init__(data.pictures, data.report, loader)
        self.labels = data.labels
        self.label_names = data.label_names

    @property
    def problem_type(self) -> str:
        """What the encoder configuration's `problem_type` must be."""
        return "single_label_classification" if self.labels.ndim == 1 else "multi_label_classification"

    @property
    def id2label(self) -> dict[int, str]:
        """For the encoder's configuration."""
        return dict(enumerate(self.label_names))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.loader.normalise(self.pixels(index)), "labels": self.labels[index]}

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`pixel_values` (batch, 3, height, width) and `labels` (batch,) or (batch, num_labels)."""
        return {"pixel_values": self.pixel_values(indices), "labels": self.labels[list(indices)]}


def load_labelled_images(
    data: str | Path,
    image_processor: Any,
    on_bad_sample: str = "raise",
    cache_bytes: int = CACHE_BYTES,
    columns: Columns = DEFAULT_COLUMNS,
) -> LabelledImageDataset:
    """Read and check the pictures of `data`: a `metadata.jsonl` or a folder with one, or what `read_table` reads.

    With `on_bad_sample="raise"` a bad record is an error naming file and record; with "skip" such records are left
    out, counted and named in `report`.
    """
    if on_bad_sample not in ("raise", "skip"):
        raise ValueError(f'on_bad_sample must be "raise" or "skip", not {on_bad_sample!r}')
    path = Path(data)
    if (path / "metadata.jsonl").is_file():
        path = path / "metadata.jsonl"
    if path.suffix in (".jsonl", ".json"):
        read = read_metadata(path, on_bad_sample)
    else:
        read = read_table(data, columns, on_bad_sample)
    return LabelledImageDataset(read, PixelLoader(image_processor, cache_bytes))


def format_report(report: dict[str, Any]) -> str:
    """The report of a dataset in a few lines for the log; every record left out is named."""
    counts = report["label_counts"]
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:NAMED_IN_MESSAGE])
    others = f" and {len(counts) - NAMED_IN_MESSAGE} more" if len(counts) > NAMED_IN_MESSAGE else ""
    lines = [f"{report['file']}: {report['records']} records, {report['used']} used; {shown}{others}"]
    for reason, messages in report["left_out"].items():
        if messages:
            lines.append(f"left out, {reason}: {len(messages)}")
            lines += [f"  {message}" for message in messages]
    return "\n".join(lines)
