"""Augmentations of a batch of pictures, each picture with its own random generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Augmentation:
    """Random flips and shifts of pixel tensors (batch, channels, height, width).

    Raises ValueError naming the field that is out of range.
    """

    horizontal_flip: float = 0.0
    """Probability of mirroring left and right."""
    vertical_flip: float = 0.0
    """Probability of mirroring top and bottom."""
    max_shift: int = 0
    """Largest shift in pixels, along each axis, in either direction; what comes into view repeats the edge."""

    def __post_init__(self) -> None:
        for field in ("horizontal_flip", "vertical_flip"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be a probability from 0 to 1, not {getattr(self, field)}")
        if self.max_shift < 0:
            raise ValueError(f"max_shift must not be negative, but is {self.max_shift}")

    def __call__(self, pixel_values: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """A new tensor of the same shape; the draws for a picture depend on its own generator alone."""
        draws = torch.stack([torch.rand(4, generator=generator) for generator in generators]).to(pixel_values.device)
        pixel_values = flip(pixel_values, draws[:, 0] < self.horizontal_flip, -1)
        pixel_values = flip(pixel_values, draws[:, 1] < self.vertical_flip, -2)
        shifts = (draws[:, 2:] * (2 * self.max_shift + 1)).floor().long() - self.max_shift
        return shift(pixel_values, shifts)


def flip(pixel_values: torch.Tensor, chosen: torch.Tensor, dimension: int) -> torch.Tensor:
    """Mirror the `chosen` pictures, (batch,) bool, along `dimension` (-1 left/right, -2 top/bottom)."""
    return torch.where(chosen[:, None, None, None], pixel_values.flip(dimension), pixel_values)


def shift(pixel_values: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Move each picture down and to the right by `shifts`, (batch, 2) whole pixels, edges replicated."""
    batch, channels, height, width = pixel_values.shape
    rows = (torch.arange(height, device=pixel_values.device) - shifts[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=pixel_values.device) - shifts[:, 1:]).clamp(0, width - 1)
    shifted = pixel_values.gather(2, rows[:, None, :, None].expand(batch, channels, height, width))
    return shifted.gather(3, columns[:, None, None, :].expand(batch, channels, height, width))
