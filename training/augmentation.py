"""Augmentations of a batch of pictures, each picture with its own draw, all from one given random generator."""

from __future__ import annotations

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

    def __call__(self, pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A new tensor of the same shape; the draws depend on `generator` and the batch size only."""
        pixel_values = random_flip(pixel_values, self.horizontal_flip, -1, generator)
        pixel_values = random_flip(pixel_values, self.vertical_flip, -2, generator)
        return random_shift(pixel_values, self.max_shift, generator)


def random_flip(
    pixel_values: torch.Tensor, probability: float, dimension: int, generator: torch.Generator
) -> torch.Tensor:
    """Mirror each picture of the batch along `dimension` (-1 left/right, -2 top/bottom) with `probability`."""
    chosen = torch.rand(len(pixel_values), generator=generator) < probability
    chosen = chosen.to(pixel_values.device)[:, None, None, None]
    return torch.where(chosen, pixel_values.flip(dimension), pixel_values)


def random_shift(pixel_values: torch.Tensor, max_shift: int, generator: torch.Generator) -> torch.Tensor:
    """Move each picture by whole pixels, uniformly from -max_shift to max_shift on both axes, edges replicated."""
    batch, channels, height, width = pixel_values.shape
    shifts = torch.randint(-max_shift, max_shift + 1, (2, batch, 1), generator=generator).to(pixel_values.device)
    rows = (torch.arange(height, device=pixel_values.device) - shifts[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=pixel_values.device) - shifts[1]).clamp(0, width - 1)
    shifted = pixel_values.gather(2, rows[:, None, :, None].expand(batch, channels, height, width))
    return shifted.gather(3, columns[:, None, None, :].expand(batch, channels, height, width))
