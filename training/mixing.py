"""Mixing the pictures of a batch and their labels: mixup, cutmix and label smoothing.

Sources: Zhang et al., "mixup" (arXiv 1710.09412); Yun et al., "CutMix" (arXiv 1905.04899); Szegedy et al., label
smoothing (arXiv 1512.00567). How they are combined follows the release (`AUG` in classification/utils/config.py,
`MIXUP_MODE: batch`): one draw decides for a whole micro-batch, in which each picture is mixed with the one as far from
the other end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import torch


@dataclass(frozen=True)
class Mixing:
    """Mixes a batch and turns its labels into probabilities. Raises `ValueError` naming a field out of range."""

    num_labels: int
    """Number of classes."""
    mixup: float = 0.0
    """Alpha of mixup: the share of the second picture is drawn from Beta(alpha, alpha); 0 turns mixup off."""
    cutmix: float = 0.0
    """Alpha of cutmix: the same for the area of the rectangle taken from the second picture; 0 turns cutmix off."""
    mixing_probability: float = 1.0
    """Probability that a batch is mixed at all."""
    cutmix_probability: float = 0.5
    """Where both are on: probability that a mixed batch gets cutmix, and not mixup."""
    label_smoothing: float = 0.0
    """Probability taken from the true class and spread evenly over all."""

    def __post_init__(self) -> None:
        for field in ("mixup", "cutmix"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, but is {getattr(self, field)}")
        for field in ("mixing_probability", "cutmix_probability"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be a probability from 0 to 1, not {getattr(self, field)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}")

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix one micro-batch.

        Args:
            pixel_values: (batch, channels, height, width), normalised; stays as it is.
            labels: (batch,) classes, negative = unknown.
            seed: decides all draws.

        Returns:
            Pixels of the same shape and (batch, num_labels) float32 probabilities; -1 throughout where one of the
            labels that were mixed is unknown.

        Raises:
            ValueError: the batch is a single picture, which mixup and cutmix cannot mix with anything.
        """
        if len(labels) < 2 and (self.mixup or self.cutmix):
            raise ValueError("mixup and cutmix need at least two images at once: set per_device_batch_size above 1")
        pixel_values, kept = self._mix(pixel_values, numpy.random.default_rng(seed))
        targets = soft_labels(labels, self.num_labels, self.label_smoothing)
        mixed = kept * targets + (1 - kept) * targets.flip(0)
        unknown = (targets < 0).any(1) | ((targets.flip(0) < 0).any(1) & (kept < 1))
        return pixel_values, mixed.masked_fill(unknown[:, None], -1.0)

    def _mix(self, pixel_values: torch.Tensor, generator: numpy.random.Generator) -> tuple[torch.Tensor, float]:
        """Mixed pixels and the share that each picture kept of itself."""
        mixed, cut, place = generator.random(), generator.random(), generator.random(2)
        if mixed >= self.mixing_probability or not (self.mixup or self.cutmix):
            return pixel_values, 1.0
        if self.cutmix and (not self.mixup or cut < self.cutmix_probability):
            return _paste(pixel_values, generator.beta(self.cutmix, self.cutmix), place)
        kept = generator.beta(self.mixup, self.mixup)
        return torch.lerp(pixel_values.flip(0), pixel_values, kept), kept


def soft_labels(labels: torch.Tensor, num_labels: int, smoothing: float) -> torch.Tensor:
    """(batch,) classes as (batch, num_labels) float32 probabilities, -1 throughout for a negative (unknown) class."""
    targets = torch.full((len(labels), num_labels), smoothing / num_labels)
    targets.scatter_(1, labels.clamp(min=0)[:, None], 1 - smoothing + smoothing / num_labels)
    return targets.masked_fill((labels < 0)[:, None], -1.0)


def _paste(pixel_values: torch.Tensor, kept: float, place: numpy.ndarray) -> tuple[torch.Tensor, float]:
    """Cutmix: a rectangle of about (1 - kept) of the area comes from the partner.

    Its centre, at `place` (fractions of height and width), may be anywhere; what the picture's border cuts off counts
    for the picture that is kept.
    """
    height, width = pixel_values.shape[-2:]
    half = math.sqrt(1 - kept) / 2
    top, bottom = (int(min(max(place[0] + sign * half, 0), 1) * height) for sign in (-1, 1))
    left, right = (int(min(max(place[1] + sign * half, 0), 1) * width) for sign in (-1, 1))
    mixed = pixel_values.clone()
    mixed[..., top:bottom, left:right] = pixel_values.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
