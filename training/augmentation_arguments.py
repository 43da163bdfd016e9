"""Arguments of what makes pictures and labels harder to remember; one dataclass that stages on images share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class AugmentationArguments:
    """Augmentation of each image, mixing of a batch, label smoothing, repeated augmentation."""

    horizontal_flip: float = 0.5
    """Probability of mirroring an image left to right."""
    vertical_flip: float = 0.0
    """Probability of mirroring an image top to bottom; for images without an up and a down."""
    max_shift: int = 0
    """Shift each image by up to this many pixels in both directions (edges repeated)."""
    crop_min_area: float = 0.0
    """Cut out a random part of each image with at least this share of its area and resize it; 0: whole images."""
    color_jitter: float = 0.0
    """Multiply brightness, contrast and saturation each by a random factor from 1 - this to 1 + this."""
    rand_augment: float = 0.0
    """Magnitude of RandAugment, up to 10: two random operations an image, each left out half the time; 0: none."""
    rand_augment_std: float = 0.5
    """Standard deviation of the normal noise on RandAugment's magnitude."""
    random_erasing: float = 0.0
    """Probability of replacing a random rectangle of an image, 2 % to 33 % of it, by noise."""
    mixup: float = 0.0
    """Alpha of mixup: each image is blended with another one of its micro-batch; 0: no mixup."""
    cutmix: float = 0.0
    """Alpha of cutmix: a rectangle of each image comes from another one of its micro-batch; 0: no cutmix."""
    mixing_probability: float = 1.0
    """Probability that a micro-batch is mixed at all (the release's MIXUP_PROB)."""
    cutmix_probability: float = 0.5
    """With mixup and cutmix on: probability of cutmix in a mixed micro-batch (the release's MIXUP_SWITCH_PROB)."""
    label_smoothing: float = 0.0
    """Probability taken from the true class and spread evenly over all classes."""
    repeated_augmentation: int = 1
    """Visits to an image in a row, each augmented anew; an epoch keeps its length and shows fewer images."""

    def check_augmentation(self) -> None:
        """Raise `ValueError` for the first field that is out of range."""
        probabilities = (
            "horizontal_flip",
            "vertical_flip",
            "random_erasing",
            "mixing_probability",
            "cutmix_probability",
        )
        for name in (*probabilities, "crop_min_area"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("max_shift", "color_jitter", "rand_augment", "rand_augment_std", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.rand_augment > 10:
            raise ValueError(f"rand_augment: must not be above 10, got {self.rand_augment}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: must lie in [0, 1), got {self.label_smoothing}")
        if self.repeated_augmentation < 1:
            raise ValueError(f"repeated_augmentation: must be at least 1, got {self.repeated_augmentation}")
