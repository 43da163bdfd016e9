"""What every reader of labelled pictures gives: the pictures, their labels, and a report of what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image


class Pictures(Protocol):
    """Pictures by position."""

    def name(self, index: int) -> str:
        """Where the picture comes from, for messages: `metadata.jsonl[12]`."""

    def load(self, index: int) -> Image.Image:
        """The picture, decoded, 8-bit RGB. Raises `ImageError` or `FileNotFoundError`."""


@dataclass(frozen=True)
class LabelledData:
    """Pictures with their labels, read and checked."""

    pictures: Pictures
    labels: torch.Tensor
    """(samples,) long: the class; or (samples, num_labels) float: 1 holds, 0 does not, -1 unknown."""
    label_names: list[str]
    """Names of the classes or attributes, in the order of the labels."""
    report: dict[str, Any]
    """What was found and what was left out: `file`, `records`, `used`, `left_out` by cause, `label_counts`."""
